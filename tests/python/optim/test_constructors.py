# SPDX-License-Identifier: MIT
"""Constructors of every optimizer: the signatures of all releases, what they refuse and ignore."""

import inspect
import warnings

import pytest
import torch
from optim_helpers import parameter, step

import bitsandbytes as bnb
from bitsandbytes.optim.optimizer import MockArgs, Optimizer1State, Optimizer2State, Optimizer8bit

pytestmark = pytest.mark.filterwarnings("ignore:.*paged memory")

REQUIRED = inspect.Parameter.empty
ADAM = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0}
TAIL = {"amsgrad": False, "optim_bits": 32, "args": None, "min_8bit_size": 4096}
ADEMAMIX = {
    "lr": 1e-3,
    "betas": (0.9, 0.999, 0.9999),
    "alpha": 5.0,
    "t_alpha": None,
    "t_beta3": None,
    "eps": 1e-8,
    "weight_decay": 1e-2,
}
LAMB = {
    "lr": 1e-3,
    "bias_correction": True,
    "betas": (0.9, 0.999),
    "eps": 1e-8,
    "weight_decay": 0,
    "amsgrad": False,
    "adam_w_mode": True,
}
SGD = {"lr": REQUIRED, "momentum": 0, "dampening": 0, "weight_decay": 0, "nesterov": False}
LION = {"lr": 1e-4, "betas": (0.9, 0.99), "weight_decay": 0}
RMSPROP = {
    "lr": 1e-2,
    "alpha": 0.99,
    "eps": 1e-8,
    "weight_decay": 0,
    "momentum": 0,
    "centered": False,
}
ADAGRAD = {
    "lr": 1e-2,
    "lr_decay": 0,
    "weight_decay": 0,
    "initial_accumulator_value": 0,
    "eps": 1e-10,
}
BITS = {"optim_bits": 32}
SIZES = {"args": None, "min_8bit_size": 4096}
PAGED = {"is_paged": False}


def table():
    """Class -> (arguments after `params` as release 0.50 has them, rule, bits, paged)."""
    rows = {}
    for suffix, bits in (("", None), ("8bit", 8), ("32bit", 32)):
        own = BITS if bits is None else {}
        adamw = {**ADAM, "weight_decay": 1e-2}
        for prefix, paged in (("", False), ("Paged", True)):
            page = {} if paged else PAGED
            rows[f"{prefix}Adam{suffix}"] = ({**ADAM, **TAIL, **PAGED}, "adam", bits, paged)
            rows[f"{prefix}AdamW{suffix}"] = ({**adamw, **TAIL, **page}, "adam", bits, paged)
            rows[f"{prefix}Lion{suffix}"] = ({**LION, **own, **SIZES, **page}, "lion", bits, paged)
            rows[f"{prefix}AdEMAMix{suffix}"] = (
                {**ADEMAMIX, **own, "min_8bit_size": 4096, **page},
                "ademamix",
                bits,
                paged,
            )
        rows[f"LAMB{suffix}"] = ({**LAMB, **own, **SIZES, "max_unorm": 1.0}, "lamb", bits, False)
        rows[f"LARS{suffix}"] = ({**SGD, **own, **SIZES, "max_unorm": 0.02}, "lars", bits, False)
        rows[f"SGD{suffix}"] = ({**SGD, **own, **SIZES}, "momentum", bits, False)
        rows[f"RMSprop{suffix}"] = ({**RMSPROP, **own, **SIZES}, "rmsprop", bits, False)
        eight = {"optim_bits": 8 if bits == 8 else 32}
        rows[f"Adagrad{suffix}"] = ({**ADAGRAD, **eight, **SIZES}, "adagrad", bits, False)
    return rows


TABLE = table()
NAMES = sorted(TABLE)
KEYWORD_ONLY = {
    "percentile_clipping": 100,
    "block_wise": True,
    "stochastic_rounding": False,
    "rounding_seed": 0,
}


def needed(name):
    """What a class cannot be made without."""
    return {"lr": 1e-2, "momentum": 0.9} if name.startswith(("SGD", "LARS")) else {}


def make(name, params=None, **kwargs):
    params = [parameter(3)] if params is None else params
    return getattr(bnb.optim, name)(params, **{**needed(name), **kwargs})


def test_table_names_every_optimizer():
    exported = {
        name
        for name in bnb.optim.__all__
        if issubclass(getattr(bnb.optim, name), torch.optim.Optimizer)
    }
    assert exported - {"PytorchLARS"} == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_signature(name):
    parameters = inspect.signature(getattr(bnb.optim, name)).parameters.values()
    positional = {p.name: p.default for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD}
    assert list(positional) == ["params", *TABLE[name][0]]
    assert positional == {"params": REQUIRED, **TABLE[name][0]}
    assert {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY} == KEYWORD_ONLY
    assert not any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters)


@pytest.mark.parametrize("name", NAMES)
def test_constructs_by_position_and_by_keyword(name):
    arguments, rule, bits, paged = TABLE[name]
    values = {**arguments, **needed(name), "min_8bit_size": 100, "weight_decay": 0.25}
    for opt in (
        make(name, **values),
        getattr(bnb.optim, name)([parameter(3)], *values.values()),
        make(name, **values, **KEYWORD_ONLY),
    ):
        assert opt.param_groups[0]["lr"] == values["lr"]
        assert opt.param_groups[0]["weight_decay"] == 0.25
        assert opt.optimizer_name == rule
        assert opt.is_paged == paged
        assert opt.args.min_8bit_size == 100
        assert opt.args.optim_bits == (bits or 32)
        assert opt.args.max_unorm == arguments.get("max_unorm", 0.0)
        two = rule in ("adam", "lamb", "ademamix")
        assert isinstance(opt, Optimizer2State if two else Optimizer1State)
        assert isinstance(opt, Optimizer8bit) and isinstance(opt, torch.optim.Optimizer)
        assert "bitsandbytes" in str(type(opt)) and type(opt).__doc__


@pytest.mark.parametrize("name", NAMES)
def test_state_bits_and_keys(name):
    # The state's entries as release 0.50 has them, for a small and a large parameter.
    _, rule, bits, _ = TABLE[name]
    p, q = parameter(70, 80), parameter(30)
    opt = make(name, [p, q], **({} if bits else {"optim_bits": 8}))
    step(opt, p, q)
    two = rule in ("adam", "lamb", "ademamix")
    rows = (2,) if rule == "ademamix" else ()
    states = {"state1": (rows, torch.float32)} | ({"state2": ((), torch.float32)} if two else {})
    for parameter_, eight in ((p, bits != 32), (q, False)):
        shape = tuple(parameter_.shape)
        want = {key: ((*row, *shape), kind) for key, (row, kind) in states.items()}
        if eight:
            want = {key: (size, torch.uint8) for key, (size, _) in want.items()}
            for i, row in enumerate([rows, ()][: len(states)], 1):
                want[f"absmax{i}"] = ((*row, 22), torch.float32)
                want[f"qmap{i}"] = ((256,), torch.float32)
        if rule in ("lamb", "lars"):
            want["unorm_vec"] = ((1,), torch.float32)
        state = dict(opt.state[parameter_])
        assert state.pop("step") == 1
        assert {key: (tuple(v.shape), v.dtype) for key, v in state.items()} == want


@pytest.mark.parametrize("name", ["PagedAdEMAMix", "PagedAdEMAMix8bit", "PagedAdEMAMix32bit"])
def test_family_of_ademamix(name):
    base = getattr(bnb.optim, name.removeprefix("Paged"))
    assert issubclass(getattr(bnb.optim, name), base) and issubclass(base, bnb.optim.AdEMAMix)


# Arguments of releases 0.24 and 0.41, by keyword.
PERCENTILE = {"percentile_clipping": 5, "block_wise": True}
OLD = {
    "Adam": {**ADAM, **TAIL, **PERCENTILE, "is_paged": False},
    "Adam8bit": {**ADAM, "amsgrad": False, "args": None, "min_8bit_size": 16384, **PERCENTILE},
    "AdamW32bit": {**ADAM, **TAIL, **PERCENTILE, "is_paged": False},
    "PagedAdamW8bit": {**ADAM, **TAIL, **PERCENTILE},
    "LAMB": {**LAMB, **TAIL, "percentile_clipping": 100, "block_wise": False, "max_unorm": 1.0},
    "LAMB8bit": {**LAMB, **SIZES, "percentile_clipping": 5, "block_wise": False, "max_unorm": 0.5},
    "LARS8bit": {**SGD, **needed("LARS"), **SIZES, "percentile_clipping": 5, "max_unorm": 0.1},
    "RMSprop8bit": {**RMSPROP, **SIZES, **PERCENTILE},
    "SGD32bit": {**SGD, **needed("SGD"), **SIZES, **PERCENTILE},
    "Lion8bit": {**LION, **SIZES, **PERCENTILE, "is_paged": False},
    "Adagrad8bit": {**ADAGRAD, "optim_bits": 8, **SIZES, **PERCENTILE, "block_wise": False},
}


@pytest.mark.parametrize("name", OLD)
def test_keywords_of_old_releases(name):
    p = parameter(5000)
    opt = make(name, [p], **OLD[name])
    assert opt.args.percentile_clipping == OLD[name].get("percentile_clipping")
    assert opt.args.block_wise == OLD[name].get("block_wise", True)
    before = p.detach().clone()
    step(opt, p)
    assert not torch.equal(p, before)


COMMON = ["lr", "betas", "eps", "weight_decay", "optim_bits", "args", "min_8bit_size"]
LEGACY = ["percentile_clipping", "block_wise", "max_unorm", "skip_zeros", "is_paged"]
ROUNDING = ["stochastic_rounding", "rounding_seed"]


@pytest.mark.parametrize(
    ("base", "names"),
    [
        (Optimizer1State, ["optimizer_name", "params", *COMMON, *LEGACY, *ROUNDING]),
        (
            Optimizer2State,
            [
                *("optimizer_name", "params", *COMMON, *LEGACY),
                *("alpha", "t_alpha", "t_beta3", *ROUNDING),
            ],
        ),
        (Optimizer8bit, ["params", "defaults", "optim_bits", "is_paged"]),
    ],
)
def test_signature_of_the_bases(base, names):
    assert list(inspect.signature(base).parameters) == names


def test_bases_take_legacy_positions():
    # As third-party subclasses call them: ..., min_8bit_size, percentile_clipping, block_wise.
    p = parameter(3)
    opt = Optimizer2State("adam", [p], 1e-3, (0.9, 0.999), 1e-8, 0.0, 8, None, 1, 100, True)
    step(opt, p)
    assert opt.state[p]["state1"].dtype == torch.uint8
    assert opt.args.max_unorm == 0.0 and opt.args.skip_zeros is False


# --- what is refused -----------------------------------------------------------------------------

NAN = float("nan")
BAD = [
    ({"lr": -1e-3}, "lr"),
    ({"lr": NAN}, "lr"),
    ({"eps": -1e-8}, "eps"),
    ({"weight_decay": -0.1}, "weight_decay"),
    ({"weight_decay": NAN}, "weight_decay"),
    ({"betas": (1.0, 0.999, 0.9)}, r"betas\[0\]"),
    ({"betas": (0.9, -0.1, 0.9)}, r"betas\[1\]"),
    ({"betas": (0.9, NAN, 0.9)}, r"betas\[1\]"),
    ({"momentum": 1.0}, r"betas\[[01]\]"),
    ({"momentum": 0.9, "dampening": 1.0}, r"betas\[1\]"),
    ({"alpha": 1.0}, r"betas\[0\]"),
    ({"max_unorm": -1.0}, "max_unorm"),
    ({"percentile_clipping": 101}, "percentile_clipping"),
    ({"percentile_clipping": -1}, "percentile_clipping"),
    ({"optim_bits": 16}, "optim_bits"),
    ({"lr_decay": 0.1}, "lr_decay"),
    ({"initial_accumulator_value": 1}, "initial_accumulator_value"),
]
REFUSED = [
    (name, kwargs, argument)
    for kwargs, argument in BAD
    for name in NAMES
    if kwargs.keys() <= {*TABLE[name][0], "percentile_clipping"}
    and not (name.endswith("32bit") and "optim_bits" in kwargs)  # which ignore it
    and not ("alpha" in kwargs and "AdEMAMix" in name)  # which is a weight there
]


@pytest.mark.parametrize(("name", "kwargs", "argument"), REFUSED)
@pytest.mark.filterwarnings("ignore:.*ignored")
def test_bad_setting_gets_a_sentence(name, kwargs, argument):
    with pytest.raises(ValueError, match=rf"^{name}: {argument} .*, got "):
        make(name, **kwargs)


@pytest.mark.parametrize(
    ("name", "kwargs", "message"),
    [
        *[(n, {"amsgrad": True}, "amsgrad") for n in ("Adam8bit", "PagedAdamW8bit", "LAMB8bit")],
        ("Adagrad8bit", {"optim_bits": 32}, "optim_bits must be 8"),
        *[(n, {"betas": (0.9, 0.99)}, "three") for n in NAMES if "AdEMAMix" in n],
        *[(n, {"block_wise": False}, "block_wise") for n in NAMES if "AdEMAMix" in n],
        *[(n, {"betas": (0.9,)}, "two numbers") for n in ("Adam8bit", "LAMB", "Lion32bit")],
        ("AdamW", {"betas": 0.9}, "two numbers"),
    ],
)
def test_what_the_class_refuses(name, kwargs, message):
    with pytest.raises(ValueError, match=f"{name}: .*{message}"):
        make(name, **kwargs)


@pytest.mark.parametrize(
    ("stem", "kwargs"),
    [
        ("SGD", {"momentum": 0}),
        ("LARS", {"momentum": 0}),
        ("RMSprop", {"alpha": 0}),
        ("RMSprop", {"centered": True}),
    ],
)
@pytest.mark.parametrize("suffix", ["", "8bit", "32bit"])
def test_what_is_not_implemented(stem, suffix, kwargs):
    with pytest.raises(NotImplementedError, match=f"{stem}{suffix}: .*must"):
        make(stem + suffix, **kwargs)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("keyword", ["maximize", "foreach", "fused", "capturable"])
def test_unknown_keyword(name, keyword):
    with pytest.raises(TypeError, match=keyword):
        make(name, **{keyword: True})


def test_missing_argument_is_named():
    for name in ("SGD", "SGD8bit", "LARS32bit"):
        with pytest.raises(TypeError, match=f"{name}.*'?lr'?"):
            getattr(bnb.optim, name)([parameter(3)])


@pytest.mark.parametrize("name", NAMES)
def test_no_parameters(name):
    with pytest.raises(ValueError, match="empty"):
        make(name, [])


def test_betas_as_text():
    opt = Optimizer2State("adam", [parameter(3)], betas="(0.9, 0.95)")
    assert list(opt.param_groups[0]["betas"]) == [0.9, 0.95]
    with pytest.raises(TypeError, match="betas"):
        Optimizer1State("momentum", [parameter(3)], betas="(0.9, 0.95)")


def test_group_without_three_betas():
    opt = bnb.optim.AdEMAMix([parameter(3)])
    with pytest.raises(ValueError, match="betas must be three"):
        opt.add_param_group({"params": [parameter(3)], "betas": (0.9, 0.99)})
    assert len(opt.param_groups) == 1


# --- what is ignored -----------------------------------------------------------------------------

IGNORED = [
    ("Adam", {"amsgrad": True}),
    ("AdamW32bit", {"amsgrad": True}),
    ("SGD", {"nesterov": True}),
    ("SGD8bit", {"nesterov": True, "dampening": 0.5}),
    ("LARS", {"dampening": 0.5}),
    ("LARS32bit", {"nesterov": True}),
    ("RMSprop8bit", {"momentum": 0.5}),
    ("LAMB", {"amsgrad": True}),
    ("LAMB8bit", {"adam_w_mode": False}),
    ("LAMB32bit", {"bias_correction": False}),
]


@pytest.mark.parametrize(("name", "kwargs"), IGNORED)
def test_ignored_argument_warns_once_at_the_callers_line(name, kwargs):
    results = []
    for given in (kwargs, {}):
        torch.manual_seed(0)
        p = parameter(5000)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            opt = getattr(bnb.optim, name)([p], **needed(name), **given)
            step(opt, p)
        assert len(caught) == bool(given)
        for warning in caught:
            assert warning.filename == __file__
            assert all(argument in str(warning.message) for argument in given)
        results.append(p)
    assert torch.equal(*results)


# --- what is kept --------------------------------------------------------------------------------


def test_args_hold_the_settings():
    args = bnb.optim.Adam8bit([parameter(3)], min_8bit_size=7).args
    assert isinstance(args, MockArgs)
    assert (args.optim_bits, args.min_8bit_size) == (8, 7)
    assert (args.max_unorm, args.skip_zeros) == (0.0, False)
    assert (args.percentile_clipping, args.block_wise) == (100, True)


def test_own_args_replace_the_settings():
    # The attributes of release 0.50; the two of older ones may be missing.
    own = MockArgs({"optim_bits": 8, "min_8bit_size": 1, "max_unorm": 0.0, "skip_zeros": False})
    p = parameter(3)
    opt = bnb.optim.Adam([p], args=own)
    assert opt.args is own
    step(opt, p)
    assert opt.state[p]["state1"].dtype == torch.uint8


def test_own_args_without_a_setting():
    p = parameter(3)
    opt = bnb.optim.Adam([p], args=MockArgs({"optim_bits": 8}))
    with pytest.raises(AttributeError, match="min_8bit_size"):
        step(opt, p)


@pytest.mark.parametrize("name", ["Adam", "AdamW8bit", "LAMB", "AdEMAMix8bit"])
def test_defaults_make_another_optimizer(name):
    # As accelerate did under FSDP.
    opt = make(name, weight_decay=0.125)
    other = type(opt)([parameter(3)], **opt.defaults)
    assert other.defaults == opt.defaults


def test_groups_of_ademamix_hold_its_schedules():
    group = bnb.optim.AdEMAMix([parameter(3)], alpha=2.0, t_alpha=7).param_groups[0]
    assert (group["alpha"], group["t_alpha"], group["t_beta3"]) == (2.0, 7, None)


def test_names_for_old_imports():
    assert bnb.adam.Adam8bit is bnb.optim.Adam8bit
    for module, name in (("adamw", "AdamW8bit"), ("ademamix", "AdEMAMix"), ("lars", "LARS")):
        assert getattr(getattr(bnb.optim, module), name) is getattr(bnb.optim, name)
    assert bnb.optim.adam.AnalysisAdam and not hasattr(bnb.optim, "AnalysisAdam")
    assert not hasattr(bnb.optim, "Optimizer8bit")


def test_class_of_a_user_may_change_what_it_inherits():
    class Own(bnb.optim.Lion, without=("args",), defaults={"lr": 0.5}):
        state_bits = 8

    opt = Own([parameter(3)], 0.25)
    assert opt.args.optim_bits == 8 and opt.param_groups[0]["lr"] == 0.25
    assert Own([parameter(3)]).param_groups[0]["lr"] == 0.5
    assert "args" not in inspect.signature(Own).parameters

    class Plain(Own):
        def __init__(self, params):
            super().__init__(params, betas=(0.5, 0.6))

    assert Plain([parameter(3)]).param_groups[0]["betas"] == (0.5, 0.6)
    with pytest.raises(TypeError, match="no argument"):

        class Wrong(bnb.optim.Lion, without=("arg",)):
            pass
