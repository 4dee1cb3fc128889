# SPDX-License-Identifier: MIT
"""Plans of steps: that they serve, give what the ops give, and step aside where they must."""

import contextlib
import copy
import gc
import pickle
import weakref

import pytest
import torch
from optim_helpers import assert_same_state
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import bitsandbytes as bnb
from bitsandbytes import _library
from bitsandbytes.optim.plan import StepPlan

OPS = (
    "optimizer_step_8bit_blockwise",
    "optimizer_step_32bit",
    "optimizer_step_8bit",
    "percentile_clipping_step",
)
# One number, no number, less than a block, blocks and a rest, several dimensions.
SHAPES = ((1,), (), (0,), (30,), (4096 + 300,), (33, 7, 5))


@pytest.fixture(autouse=True)
def _native(request):
    device = request.getfixturevalue("device") if "device" in request.fixturenames else "cpu"
    library = _library.libraries["_cuda" if device == "cuda" else "_ops"]
    if not library.loaded:
        pytest.skip(f"{library.name} is not loaded: {library.reason}")
    if not hasattr(torch.Tensor, "__dlpack_c_exchange_api__"):
        pytest.skip("this torch describes no tensors to native code")


class Counted:
    """How many steps of buckets were taken by plans, and how many by ops."""

    def __init__(self, monkeypatch):
        self.planned = self.listed = 0
        self._serving = True
        take = StepPlan.take

        def counted_take(plan, *args):
            taken = self._serving and take(plan, *args)
            self.planned += taken
            return taken

        monkeypatch.setattr(StepPlan, "take", counted_take)
        for name in OPS:
            monkeypatch.setattr(torch.ops.bitsandbytes, name, self._counted(name))

    def _counted(self, name):
        op = getattr(torch.ops.bitsandbytes, name)

        class Op:
            __name__ = name

            def __call__(_, *args):
                self.listed += self._serving
                return op(*args)

            def __getattr__(_, attribute):
                return getattr(op, attribute)

        return Op()

    @contextlib.contextmanager
    def without_plans(self):
        """No plan serves, and nothing is counted."""
        self._serving = False
        yield
        self._serving = True

    def since(self):
        """The counts since the last call."""
        counts = (self.planned, self.listed)
        self.planned = self.listed = 0
        return counts


@pytest.fixture
def counted(monkeypatch):
    return Counted(monkeypatch)


BY_PLAN, BY_OP = (1, 0), (0, 1)


def parameters(device, dtype=torch.float32, shapes=SHAPES):
    generator = torch.Generator().manual_seed(1)
    return [nn.Parameter(torch.randn(s, generator=generator).to(device, dtype)) for s in shapes]


def give_gradients(params, seed):
    generator = torch.Generator().manual_seed(seed)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator).to(p.device, p.dtype)


class Pair:
    """An optimizer, and a twin that steps by ops alone."""

    def __init__(self, counted, device, make=None, dtype=torch.float32, shapes=SHAPES):
        make = make or (lambda params: bnb.optim.Adam8bit(params, lr=1e-2, min_8bit_size=0))
        self.counted = counted
        self.params, self.others = (parameters(device, dtype, shapes) for _ in range(2))
        self.opt, self.twin = make(self.params), make(self.others)
        self.seed = 0

    @property
    def both(self):
        return ((self.opt, self.params), (self.twin, self.others))

    def gradients(self):
        self.seed += 1
        for _, params in self.both:
            give_gradients(params, self.seed)

    def step(self, gradients=True):
        if gradients:
            self.gradients()
        self.opt.step()
        with self.counted.without_plans():
            self.twin.step()

    def check(self):
        for p, q in zip(self.params, self.others, strict=True):
            assert torch.equal(p, q)
            assert_same_state(self.opt.state[p], self.twin.state[q])


MAKERS = {
    "adam8": lambda ps: bnb.optim.Adam8bit(ps, lr=1e-2, min_8bit_size=0, weight_decay=0.1),
    "adam32": lambda ps: bnb.optim.Adam32bit(ps, lr=1e-2),
    "lion8": lambda ps: bnb.optim.Lion8bit(ps, lr=1e-2, min_8bit_size=0),
    "lion32": lambda ps: bnb.optim.Lion32bit(ps, lr=1e-2),
    "ademamix8": lambda ps: bnb.optim.AdEMAMix8bit(ps, lr=1e-2, min_8bit_size=0, t_alpha=4),
    "ademamix32": lambda ps: bnb.optim.AdEMAMix32bit(ps, lr=1e-2, t_beta3=4),
    "adam8_whole": lambda ps: bnb.optim.Adam8bit(ps, lr=1e-2, min_8bit_size=0, block_wise=False),
    "lion8_whole": lambda ps: bnb.optim.Lion8bit(ps, lr=1e-2, min_8bit_size=0, block_wise=False),
    "rounded": lambda ps: bnb.optim.AdamW8bit(
        ps, lr=1e-2, min_8bit_size=0, stochastic_rounding=True, rounding_seed=5
    ),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_plan_gives_what_the_op_gives(device, make, dtype, counted):
    pair = Pair(counted, device, make, dtype)
    pair.step()
    assert counted.since() == BY_OP
    for _ in range(4):
        pair.step()
        assert counted.since() == BY_PLAN
    pair.check()


# ---- Bounds on whole tensors --------------------------------------------------------------------

# Bounds that bind: updates of the default settings are larger than these.
BOUNDED = {
    "lamb8": lambda ps: bnb.optim.LAMB8bit(ps, lr=1e-1, min_8bit_size=0, max_unorm=0.1),
    "lamb32": lambda ps: bnb.optim.LAMB32bit(ps, lr=1e-1, max_unorm=0.1),
    "lars8": lambda ps: bnb.optim.LARS8bit(ps, lr=1e-1, momentum=0.9, min_8bit_size=0),
    "lars32": lambda ps: bnb.optim.LARS32bit(ps, lr=1e-1, momentum=0.9),
    "adam8_clipped": lambda ps: bnb.optim.Adam8bit(
        ps, lr=1e-1, min_8bit_size=0, percentile_clipping=50
    ),
    "adam32_clipped": lambda ps: bnb.optim.Adam32bit(ps, lr=1e-1, percentile_clipping=0),
    "lamb8_clipped": lambda ps: bnb.optim.LAMB8bit(
        ps, lr=1e-1, min_8bit_size=0, max_unorm=0.1, percentile_clipping=50
    ),
    "lamb8_whole": lambda ps: bnb.optim.LAMB8bit(
        ps, lr=1e-1, min_8bit_size=0, max_unorm=0.1, percentile_clipping=50, block_wise=False
    ),
    "ademamix8": lambda ps: bounded(bnb.optim.AdEMAMix8bit(ps, lr=1e-1, min_8bit_size=0)),
    "adam8": lambda ps: bounded(bnb.optim.Adam8bit(ps, lr=1e-1, min_8bit_size=0), clipped=30),
}


def bounded(opt, clipped=100):
    opt.args.max_unorm, opt.args.percentile_clipping = 0.05, clipped
    return opt


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", BOUNDED.values(), ids=BOUNDED)
def test_plan_bounds_as_the_op_does(device, make, dtype, counted):
    pair = Pair(counted, device, make, dtype)
    free = parameters(device, dtype)
    loose = make(free)
    loose.args.max_unorm, loose.args.percentile_clipping = 0.0, 100
    pair.step()
    assert counted.since()[0] == 0
    for scale in (1.0, 0.5, 4.0, 2.0):  # some gradients are clipped, and some are not
        pair.gradients()
        for _, params in pair.both:
            for p in params:
                p.grad.mul_(scale)
        pair.step(gradients=False)
        assert counted.since() == BY_PLAN
    pair.check()
    # Neither the twin nor the plan left the bounds out.
    for seed, scale in enumerate((1.0, 1.0, 0.5, 4.0, 2.0), start=1):
        give_gradients(free, seed)
        for p in free:
            p.grad.mul_(scale)
        loose.step()
    assert not any(torch.equal(p, q) for p, q in zip(pair.params[3:], free[3:], strict=True))


@pytest.mark.parametrize("make", ["adam8", "adam32", "lion8_whole", "lamb8_clipped"])
def test_lists_of_several_launches(device, make, counted):
    # The last launch, which counts the step, may have nothing else to do.
    make = {**MAKERS, **BOUNDED}[make]
    empty = 600 if device == "cuda" else 20
    pair = Pair(counted, device, make, shapes=[(7,), (0,), (300,)] * 12 + [(0,)] * empty)
    for _ in range(3):
        pair.step()
    assert counted.since()[0] == 2
    pair.check()


def test_list_of_empty_tensors(device, counted):
    pair = Pair(counted, device, MAKERS["adam8_whole"], shapes=((0,), (3, 0)))
    for _ in range(3):
        pair.step()
    assert counted.since() == (2, 1)
    assert pair.opt._buckets[0].step_tensor == 3
    pair.check()


@pytest.mark.parametrize("move", ["rebound", "resized"])
def test_histories_that_move_without_being_looked_up(device, move, counted):
    pair = Pair(
        counted,
        device,
        lambda ps: bnb.optim.Adam8bit(ps, lr=1e-2, min_8bit_size=0, percentile_clipping=50),
        shapes=((600,), (300,)),
    )
    pair.step()
    held = [opt.state[p]["gnorm_vec"] for opt, (p, _) in pair.both]
    for _ in range(2):
        pair.step()
    counted.since()
    kept = [globals()[move](entry) for entry in held]
    pair.step()
    planned, listed = counted.since()
    assert (planned, listed) == (0, 2) or (move == "resized" and (planned, listed) == BY_PLAN)
    del kept
    for _ in range(3):
        pair.step()
    pair.check()


def test_gradients_that_need_the_ops_are_clipped_once(device, counted):
    pair = Pair(
        counted,
        device,
        lambda ps: bnb.optim.Adam8bit(ps, lr=1e-2, min_8bit_size=0, percentile_clipping=50),
        shapes=((30,), (5, 300)),
    )
    for _ in range(3):
        pair.step()
    counted.since()
    for make in (transposed, None):
        pair.gradients()
        for _, params in pair.both:
            torch.manual_seed(3)
            if make is not None:
                make(params[1])
        pair.step(gradients=False)
        assert counted.since() == ((0, 2) if make is not None else BY_PLAN)
    pair.check()


def test_layouts_of_parameters(device, counted):
    def strided(params):
        for p in params:
            p.data = p.data.clone(memory_format=torch.channels_last)
        return bnb.optim.Adam8bit(params, lr=1e-2, min_8bit_size=0)

    pair = Pair(counted, device, strided, shapes=((2, 3, 4, 5),))
    pair.params[0].grad = torch.randn(2, 3, 4, 5).to(device)
    for _ in range(3):
        pair.step()
    # States are row-major: the op copies such a parameter in every step.
    assert counted.since() == (0, 3)
    pair.check()


def test_settings_that_change_between_steps(device, counted):
    pair = Pair(counted, device)
    lr = torch.tensor(0.05, device=device)
    pair.step()
    counted.since()
    for change in (
        {"lr": 0.3},
        {"betas": (0.5, 0.6)},
        {"weight_decay": 1},
        {"lr": lr},
        {"lr": lr.double()},
        {"lr": lr.cpu().double()},
        {"eps": 1e-3},
    ):
        for opt in (pair.opt, pair.twin):
            opt.param_groups[0].update(change)
        pair.step()
        assert counted.since() == BY_PLAN, change
    for name, values in (("max_unorm", (0.01, 0.0)), ("percentile_clipping", (50, 7, 100))):
        for value in values:
            for opt in (pair.opt, pair.twin):
                setattr(opt.args, name, value)
            pair.step()
            assert counted.since() == BY_PLAN, (name, value)
    for opt in (pair.opt, pair.twin):
        opt.args.skip_zeros = True
    pair.step()
    assert counted.since() == BY_PLAN
    pair.check()


# ---- Gradients ----------------------------------------------------------------------------------


def transposed(p):
    p.grad = torch.randn(p.shape[::-1]).to(p).permute(*range(p.dim())[::-1])


def expanded(p):
    p.grad = torch.ones((), device=p.device).expand(p.shape)


class Subclass(torch.Tensor):
    pass


def subclassed(p):
    p.grad = torch.randn(p.shape).to(p).as_subclass(Subclass)


@pytest.mark.parametrize("change", [transposed, expanded, subclassed])
def test_gradients_that_need_the_op(device, change, counted):
    pair = Pair(counted, device, shapes=((30,), (5, 300)))
    for _ in range(2):
        pair.step()
    counted.since()
    pair.gradients()
    torch.manual_seed(3)
    change(pair.params[1])
    torch.manual_seed(3)
    change(pair.others[1])
    pair.step(gradients=False)
    planned, listed = counted.since()
    assert planned == 0 and listed > 0  # a subclass calls the op again
    pair.step()
    assert counted.since() == BY_PLAN
    pair.check()


def test_gradient_that_stands_for_the_negative_of_its_memory(device, counted):
    pair = Pair(counted, device, shapes=((1,), (30,)))
    for _ in range(2):
        pair.step()
    counted.since()
    pair.gradients()
    for params in (pair.params, pair.others):
        params[0].grad = torch.tensor([1 + 2j], device=device).conj().imag
        assert params[0].grad.is_neg() and params[0].grad.is_contiguous()
    pair.step(gradients=False)
    assert counted.since() == BY_OP
    pair.check()


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        (lambda g: g.double(), r"grads\[1\] must have dtype Float, got Double"),
        (lambda g: g[:-1], r"grads\[1\] must have 30 elements, got 29"),
    ],
    ids=["dtype", "shape"],
)
def test_wrong_gradients_are_refused_by_the_op_and_nothing_is_written(device, wrong, sentence):
    params = parameters(device, shapes=((5,), (30,)))
    opt = bnb.optim.Adam8bit(params, min_8bit_size=0)
    for seed in range(3):
        give_gradients(params, seed)
        opt.step()
    before = [p.detach().clone() for p in params]
    # torch checks what is assigned to `grad`, not what becomes of it.
    grad = params[1].grad
    params[1].grad.data = wrong(grad)
    try:
        with pytest.raises(Exception, match=sentence):
            opt.step()
    finally:
        params[1].grad = None
    assert all(map(torch.equal, params, before))


def test_gradients_that_come_and_go(device, counted):
    pair = Pair(counted, device, shapes=((30,), (600,)))
    for zero in (None, True, True, False, False):
        if zero is not None:
            pair.opt.zero_grad(set_to_none=zero)
            pair.twin.zero_grad(set_to_none=zero)
        for params in (pair.params, pair.others):
            for _ in range(2):  # accumulated
                sum((p.float() ** 2).sum() for p in params).backward()
        pair.step(gradients=False)
    assert counted.since() == (4, 1)
    pair.gradients()
    pair.params[0].grad = pair.others[0].grad = None
    pair.step(gradients=False)  # a list of one
    pair.step()  # two lists: the numbers of their steps differ
    assert counted.since() == (0, 3)
    pair.step()
    assert counted.since() == (2, 0)
    pair.check()


# ---- Memory that moves --------------------------------------------------------------------------


def rebound(p):
    p.data = p.data.clone()


def rebound_to_other_strides(p):
    p.data = p.data.clone().view(-1).as_strided(p.shape, (1, p.shape[0]))


def swapped(p):
    torch.utils.swap_tensors(p, nn.Parameter(p.detach().clone()))


def resized(p):
    values = p.detach().clone()
    storage = p.untyped_storage()
    size = storage.size()
    storage.resize_(0)
    keep = torch.zeros_like(values)  # likely where the storage was
    storage.resize_(size)
    with torch.no_grad():
        p.copy_(values)
    return keep


@pytest.mark.parametrize("move", [rebound, rebound_to_other_strides, swapped, resized])
def test_parameters_that_move(device, move, counted):
    pair = Pair(counted, device, shapes=((30,), (6, 50)))
    for _ in range(2):
        pair.step()
    counted.since()
    for params in (pair.params, pair.others):
        params[1].grad = None
        move(params[1])
    pair.step()
    planned, listed = counted.since()
    assert planned + listed == 1
    if move is not resized:  # memory may come back to the same place
        assert listed == 1
    for _ in range(3):
        pair.step()
    pair.check()


def test_parameter_of_another_dtype_at_the_same_address(device):
    params = parameters(device, torch.float16, shapes=((5,), (30,)))
    opt = bnb.optim.Adam8bit(params, min_8bit_size=0)
    for seed in range(3):
        give_gradients(params, seed)
        opt.step()
    params[1].data = params[1].data.view(torch.bfloat16)
    before = [p.detach().clone() for p in params]
    give_gradients(params, 9)
    with pytest.raises(RuntimeError, match=r"params\[1\] must have dtype"):
        opt.step()
    assert all(map(torch.equal, params, before))


@pytest.mark.parametrize("key", ["state1", "state2", "absmax1", "absmax2"])
@pytest.mark.parametrize("move", [rebound, resized])
def test_states_that_move_without_being_looked_up(device, key, move, counted):
    pair = Pair(counted, device, shapes=((600,), (300,)))
    pair.step()
    held = [opt.state[p][key] for opt, (p, _) in pair.both]
    for _ in range(2):
        pair.step()
    counted.since()
    kept = [move(entry) for entry in held]
    pair.step()
    planned, listed = counted.since()
    assert planned + listed == 1
    if move is rebound:
        assert listed == 1
    del kept
    for _ in range(3):
        pair.step()
    pair.check()


def look(opt):
    return opt.state[opt.param_groups[0]["params"][0]]["state1"]


def look_at_checkpoint(opt):
    return opt.state_dict()["state"][0]["__bnb_optimizer_quant_state__"]["state1"]


def look_at_content(opt):
    return opt.__getstate__()["state"][opt.param_groups[0]["params"][0]]["state1"]


@pytest.mark.parametrize("captured", [False, True])
@pytest.mark.parametrize("reload", [False, True])
@pytest.mark.parametrize("look", [look, look_at_checkpoint, look_at_content])
def test_states_that_move_after_they_were_seen(device, look, reload, captured, counted):
    pair = Pair(counted, device, shapes=((600,), (300,)))
    for _ in range(3):
        pair.step()
    for opt, _ in pair.both:
        if reload:
            opt.load_state_dict(copy.deepcopy(opt.state_dict()))
    for _ in range(2):
        pair.step()
    assert not pair.opt._buckets[0]._plan.watched
    bucket = pair.opt._buckets[0]
    bucket.captured = captured  # then it outlives the look
    held = [look(opt) for opt, _ in pair.both]
    for _ in range(3):
        pair.step()
    assert (pair.opt._buckets[0] is bucket) == captured
    counted.since()
    for entry in held:
        rebound(entry)
    pair.step()
    assert counted.since() == BY_OP
    for _ in range(3):
        pair.step()
    pair.check()


def test_states_in_a_dictionary_that_somebody_keeps(device, counted):
    pair = Pair(counted, device, shapes=((600,), (300,)))
    held = [opt.state for opt, _ in pair.both]
    for _ in range(3):
        pair.step()
    for state, (_, params) in zip(held, pair.both, strict=True):
        rebound(state[params[1]]["absmax2"])
    counted.since()
    pair.step()
    assert counted.since() == BY_OP
    pair.step()
    pair.check()


def test_states_that_nobody_has_seen_are_not_watched(device):
    params = parameters(device, shapes=((600,), (300,)))
    opt = bnb.optim.Adam8bit(params, lr=1e-2, min_8bit_size=0)

    def is_watched(opt):
        give_gradients(opt.param_groups[0]["params"], 1)
        opt.step()
        return opt._buckets[0]._plan.watched

    assert not is_watched(opt)
    look(opt)
    assert is_watched(opt)
    opt.load_state_dict(opt.state_dict())
    assert not is_watched(opt)
    opt.state = opt.state
    assert is_watched(opt)
    assert is_watched(copied(opt)) and is_watched(pickled(opt))


def test_state_entries_that_are_replaced(device, counted):
    pair = Pair(counted, device, shapes=((600,), (300,)))
    for _ in range(3):
        pair.step()
    for opt, (p, _) in pair.both:
        opt.state[p]["state1"] = torch.zeros_like(opt.state[p]["state1"])
    counted.since()
    pair.step()
    assert counted.since() == BY_OP
    pair.step()
    assert counted.since() == BY_PLAN
    pair.check()


def test_plans_of_moving_parameters_grow_rare(device, counted):
    pair = Pair(counted, device, shapes=((600,),))
    plans = 0
    make = bnb.optim.plan._make

    def counted_make(*args):
        nonlocal plans
        plans += 1
        return make(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bnb.optim.plan, "_make", counted_make)
        for _ in range(40):
            for params in (pair.params, pair.others):
                params[0].grad = None
                rebound(params[0])
            pair.step()
    assert counted.since()[1] + plans >= 40
    assert 2 <= plans <= 10
    pair.check()


# ---- Life of an optimizer -----------------------------------------------------------------------


def test_group_that_is_added(device, counted):
    pair = Pair(counted, device, shapes=((600,),))
    for _ in range(3):
        pair.step()
    for opt, params in pair.both:
        params.append(nn.Parameter(torch.ones(40, device=device)))
        opt.add_param_group({"params": [params[-1]], "lr": 0.5})
    for _ in range(3):
        pair.step()
    counted.since()
    pair.step()
    assert counted.since() == (2, 0)
    pair.check()


def copied(opt):
    return copy.deepcopy(opt)


def pickled(opt):
    return pickle.loads(pickle.dumps(opt))


def reloaded(opt):
    params = [nn.Parameter(p.detach().clone()) for p in opt.param_groups[0]["params"]]
    other = bnb.optim.Adam8bit(params, min_8bit_size=0)
    other.load_state_dict(opt.state_dict())
    return other


@pytest.mark.parametrize("make", [copied, pickled, reloaded])
def test_copies_with_a_plan_alive(device, make, counted):
    pair = Pair(counted, device)
    for _ in range(3):
        pair.step()
    other = make(pair.opt)
    others = other.param_groups[0]["params"]
    counted.since()
    for seed in range(10, 14):
        give_gradients(others, seed)
        other.step()
    assert counted.since() == (3, 1)
    # The copies have memory of their own.
    for params in (pair.params, pair.others):
        assert not any(map(torch.equal, params[3:], others[3:]))
    for seed in range(10, 14):
        for params in (pair.params, pair.others):
            give_gradients(params, seed)
        pair.step(gradients=False)
    pair.check()
    for p, q in zip(pair.params, others, strict=True):
        assert torch.equal(p, q)
        assert_same_state(pair.opt.state[p], other.state[q])


def test_checkpoint_loaded_into_the_same_optimizer(device, counted):
    pair = Pair(counted, device)
    for _ in range(3):
        pair.step()
    for opt, _ in pair.both:
        opt.load_state_dict(copy.deepcopy(opt.state_dict()))
    counted.since()
    for _ in range(3):
        pair.step()
    assert counted.since() == (2, 1)
    pair.check()


def test_nothing_outlives_the_optimizer(device, counted):
    params = parameters(device, shapes=((30,), (600,)))
    opt = bnb.optim.Adam8bit(params, min_8bit_size=0)
    for seed in range(3):
        give_gradients(params, seed)
        opt.step()
    assert counted.since() == (2, 1)
    grads = [weakref.ref(p.grad) for p in params]
    opt.zero_grad()
    assert all(ref() is None for ref in grads)
    states = opt._state.values()
    entries = [e for state in states for e in state.values() if torch.is_tensor(e)]
    # Levels are shared by all optimizers of the process.
    own = [weakref.ref(e) for e in entries if e.numel() != 256]
    own += [weakref.ref(p) for p in params]
    del opt, params, states, entries
    gc.collect()
    assert len(own) == 10 and all(ref() is None for ref in own)


# ---- Who looks on -------------------------------------------------------------------------------


def test_modes_see_the_op(device, counted):
    class Dispatch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func.name())
            return func(*args, **(kwargs or {}))

    class Function(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            seen.append(func.__name__)
            return func(*args, **(kwargs or {}))

    params = parameters(device)
    opt = bnb.optim.Adam8bit(params, min_8bit_size=0)
    give_gradients(params, 0)
    for _ in range(2):
        opt.step()
    for mode in (Dispatch, Function):
        seen = []
        counted.since()
        with mode():
            opt.step()
        planned, listed = counted.since()
        assert planned == 0 and listed > 0  # a function mode calls the op again
        assert any("optimizer_step_8bit_blockwise" in name for name in seen)
        opt.step()
        assert counted.since() == BY_PLAN


def test_default_device_hides_nothing(device, counted):
    params = parameters(device)
    opt = bnb.optim.Adam8bit(params, min_8bit_size=0)
    give_gradients(params, 0)
    with torch.device(device):
        for _ in range(3):
            opt.step()
    assert counted.since()[0] == 2


def test_torch_without_descriptions_of_tensors(device, counted, monkeypatch):
    monkeypatch.delattr(torch.Tensor, "__dlpack_c_exchange_api__")
    params = parameters(device)
    opt = bnb.optim.Adam8bit(params, min_8bit_size=0)
    give_gradients(params, 0)
    for _ in range(3):
        opt.step()
    assert counted.since() == (0, 3)


@pytest.mark.parametrize("make", [MAKERS["adam8"], BOUNDED["lamb8_clipped"]])
def test_capture(device, make, counted):
    if device != "cuda":
        pytest.skip("graphs are captured on CUDA and ROCm devices")
    pair = Pair(counted, device, make)
    for _ in range(2):
        pair.step()
    pair.gradients()
    counted.since()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        pair.opt.step()
    assert counted.since() == BY_PLAN
    for _ in range(3):
        graph.replay()
        with counted.without_plans():
            pair.twin.step()
    pair.check()


def test_parameters_on_two_devices(counted):
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU beside the CPU")
    devices = ["cpu", *(f"cuda:{i}" for i in range(min(2, torch.cuda.device_count())))]
    params = [p for d in devices for p in parameters(d, shapes=((30,), (600,)))]
    opt = bnb.optim.Adam8bit(params, min_8bit_size=0)
    for seed in range(3):
        give_gradients(params[:2], seed)
        for p, twin in zip(params[2:], params[:2] * (len(devices) - 1), strict=True):
            p.grad = twin.grad.to(p.device)
        opt.step()
    assert counted.since() == (2 * len(devices), len(devices))
    for p, q in zip(params[:2], params[2:4], strict=True):
        torch.testing.assert_close(p.cpu(), q.cpu(), rtol=1e-3, atol=1e-4)


# ---- The native side trusts nobody --------------------------------------------------------------


@pytest.fixture
def native(device):
    """A native plan with its parameters and the options of a step."""
    params = parameters(device, shapes=((30,), (600,)))
    opt = bnb.optim.Adam8bit(params, min_8bit_size=0)
    for seed in range(2):
        give_gradients(params, seed)
        opt.step()
    bucket = opt._buckets[0]
    options = bucket._options(opt._merge_config(bucket.group, None))
    return opt, bucket._plan._native, params, options


def rebuilt(native, number, params):
    library = next(x for x in _library.libraries.values() if x.serves == params[0].device.type)
    return type(native)(str(library.path), number, torch.Tensor, tuple(params))


def test_native_plan_refuses_what_is_no_step(native):
    _, plan, params, options = native
    grads = [p.grad for p in params]
    before = [p.detach().clone() for p in params]
    for wrong in ([], grads[:1], grads[::-1], [*grads, grads[0]], [None, None], [1, "a"]):
        assert not plan.take(wrong, options)
    for i in (0, 1, 2, 9, 14, 15, 16):
        wrong = list(options)
        wrong[i] = "none of these" if i != 9 else None
        assert not plan.take(grads, tuple(wrong))
    assert not plan.take(grads, options[:14])
    assert not plan.take(grads, (*options, None, None))
    assert not plan.take(grads, options, -1)
    ones = torch.ones(len(params), device=params[0].device)
    for bound in (-1.0, float("nan")):
        assert not plan.take(grads, (*options[:13], bound, *options[14:]))
    assert not plan.take(grads, (*options[:13], 0.1, None, None, None, ones))
    assert not plan.take(grads, (*options[:15], ones), 5)
    for vector in (
        ones.double(),
        ones.int(),
        ones[:1],
        ones.repeat(2),
        ones.repeat(2)[::2],
        ones.view(1, -1),
        ones.as_subclass(Subclass),
        *([ones.cpu()] if ones.is_cuda else []),
    ):
        for i in range(3):
            per_parameter = [None, None, None]
            per_parameter[i] = vector
            assert not plan.take(grads, (*options[:15], *per_parameter))
    assert not plan.take(grads, (torch.zeros(2, dtype=torch.int64), *options[1:]))
    with pytest.raises(TypeError):
        plan.take(None, None)
    assert all(map(torch.equal, params, before))
    assert plan.take(grads, options)


@pytest.mark.parametrize(
    ("names", "max_unorm"),
    [
        (("gnorm_scales",), 0.0),
        (("unorm",), 0.0),
        (("unorm",), 0.01),
        ((), 0.01),
        (("update_scales",), 0.0),
        (("gnorm_scales", "unorm"), 0.01),
        (("gnorm_scales", "unorm", "update_scales"), 0.0),
    ],
)
def test_numbers_per_parameter_give_what_they_give_the_op(native, names, max_unorm):
    opt, plan, params, options = native
    bucket = opt._buckets[0]
    lists = [params, bucket.state1, bucket.state2, bucket.absmax1, bucket.absmax2]
    copies = [[t.detach().clone() for t in part] for part in lists]
    grads = [p.grad for p in params]

    def with_vectors(vectors):
        order = ("gnorm_scales", "unorm", "update_scales")
        return (*options[:13], max_unorm, None, *(vectors.get(name) for name in order))

    values = torch.tensor([0.25, 0.75], device=params[0].device)
    ours, theirs = ({name: values.clone() for name in names} for _ in range(2))
    taken = options[0].clone()
    assert plan.take(grads, with_vectors(ours))
    assert options[0] == taken + 1
    options = (taken, *options[1:])
    params_, state1, state2, absmax1, absmax2 = copies
    torch.ops.bitsandbytes.optimizer_step_8bit_blockwise(
        *("adam", params_, grads, state1, state2, absmax1, absmax2, bucket.qmap1, bucket.qmap2),
        *with_vectors(theirs),
    )
    for part, copied_part in zip(lists, copies, strict=True):
        assert all(map(torch.equal, part, copied_part))
    for name in names:
        assert torch.equal(ours[name], theirs[name])
        assert torch.equal(ours[name], values) == (name != "unorm")


def test_native_plan_without_histories_clips_nothing(native):
    _, plan, params, options = native
    before = [p.detach().clone() for p in params]
    assert not plan.take([p.grad for p in params], options, 5)
    assert all(map(torch.equal, params, before))


def test_native_plan_serves_the_parameters_it_was_made_for(native):
    _, plan, params, options = native
    others = parameters(params[0].device, shapes=((30,), (600,)))
    shorter = [nn.Parameter(p.detach()[:10]) for p in params]  # the same addresses
    for wrong in (others, shorter, params[:1], params[::-1]):
        for number in range(1, 2000):
            other = rebuilt(plan, number, wrong)
            assert not other.take([p.detach().clone() for p in wrong], options)
            del other  # and with it the plan of that number
            if number > 50:
                break


def test_native_plan_with_arguments_that_are_none(native):
    _, plan, params, options = native
    grads = [p.grad for p in params]
    unknown = rebuilt(plan, 2**62, params)
    assert not unknown.take(grads, options) and unknown.stale
    make = type(plan)
    for library in ("/nowhere.so", "libc.so.6"):
        with pytest.raises(RuntimeError, match="StepPlan"):
            make(library, 1, torch.Tensor, tuple(params))
    path = str(_library.libraries["_ops"].path)
    with pytest.raises(AttributeError):
        make(path, 2**62, int, tuple(params))
    for wrong in ((), (1,), (None, None), (torch.zeros(3, dtype=torch.int32),)):
        with pytest.raises(ValueError, match="StepPlan: params"):
            make(path, 2**62, torch.Tensor, wrong)
    assert plan.take(grads, options)


def test_plan_op_checks_every_list(device):
    params = parameters(device, shapes=((30,), (600,)))
    opt = bnb.optim.Adam8bit(params, min_8bit_size=0)
    give_gradients(params, 0)
    opt.step()
    b = opt._buckets[0]
    plan = torch.ops.bitsandbytes._optimizer_plan
    lists = [b.params, b.state1, b.state2, b.absmax1, b.absmax2]
    names = ("max1", "max2", "new_max1", "new_max2")
    scales = {name: torch.zeros(2, device=device) for name in names}
    whole = (*lists[:3], [], [], b.qmap1, b.qmap2)
    tickets = torch.zeros(3, dtype=torch.int32, device=device)

    def rest(step=b.step_tensor, tickets=tickets, histories=(), **scales):
        return (*(scales.get(name) for name in names), step, tickets, list(histories))

    for i, name in enumerate(("params", "state1", "state2", "absmax1", "absmax2")):
        wrong = list(lists)
        wrong[i] = [t.double() for t in lists[i]]
        with pytest.raises(RuntimeError, match=f"_optimizer_plan: {name}"):
            plan("adam", *wrong, b.qmap1, b.qmap2, *rest())
        wrong[i] = lists[i][:1]
        with pytest.raises(RuntimeError, match="_optimizer_plan"):
            plan("adam", *wrong, b.qmap1, b.qmap2, *rest())
    history = torch.zeros(100, device=device)
    for wrong in ([history], [history, history.double()], [history, history[:99]]):
        with pytest.raises(RuntimeError, match="_optimizer_plan: gnorm_vec"):
            plan("adam", *lists, b.qmap1, b.qmap2, *rest(histories=wrong))
    with pytest.raises(RuntimeError, match="_optimizer_plan: qmap2"):
        plan("adam", *lists, b.qmap1, None, *rest())
    with pytest.raises(RuntimeError, match="_optimizer_plan: step"):
        plan("adam", *lists, b.qmap1, b.qmap2, *rest(step=b.step_tensor.float()))
    for wrong in (tickets[:2], tickets.long(), tickets.repeat(2)[::2]):
        with pytest.raises(RuntimeError, match="_optimizer_plan: tickets"):
            plan("adam", *lists, b.qmap1, b.qmap2, *rest(tickets=wrong))
    for name in names:
        for wrong in (scales["max1"].double(), scales["max1"][:1], None):
            if (name, wrong) == ("max1", None):  # then scales are expected block by block
                continue
            with pytest.raises(RuntimeError, match=f"_optimizer_plan: {name}"):
                plan("adam", *whole, *rest(**{**scales, name: wrong}))
    with pytest.raises(RuntimeError, match="_optimizer_plan: new_max1 must not share"):
        plan("adam", *whole, *rest(**{**scales, "new_max1": scales["max1"]}))
    assert plan("adam", *whole, *rest(**scales)) > 0
