# make demo | test | fast | native | interop | check | bench     on a fresh machine each sets up .venv first; needs only python3 (>= 3.10) and g++
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
PEERS  := $(VENV)/.peers
GPTQ   := $(VENV)/gptq

.PHONY: demo test fast native interop check bench clean

demo: $(STAMP)
	$(BIN)/spicerack demo

test: $(STAMP)
	$(BIN)/python -m pytest -n 2 --dist loadgroup -m "not interop and not builds"

# What a change most likely breaks, in a minute and a half on two cores; test has all of it and more.
fast: $(STAMP)
	$(BIN)/python -m pytest -n 2 --dist loadgroup -m "not slow and not interop"

# The native code under sanitizers, and on processors that are emulated: compiling it so takes longer than all other tests.
native: $(STAMP)
	$(BIN)/python -m pytest -n 2 --dist loadgroup -m builds

# Other projects read our folders and compute what we do. gptqmodel compiles its first forward pass for a minute if torch
# lets it.
interop: $(STAMP) $(GPTQ)/.installed
	$(BIN)/python -m pytest -n 2 --dist loadgroup -m interop
	TORCHDYNAMO_DISABLE=1 $(GPTQ)/bin/python -m pytest -m interop -k gptqmodel tests/exports

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(PEERS)
	$(BIN)/python -m benchmarks.quantization.speed
	$(BIN)/python -m benchmarks.kernels.layers
	$(BIN)/python -m benchmarks.runtime.models

# torch goes first, so that nothing that depends on it pulls another build.
$(STAMP): pyproject.toml constraints.txt CMakeLists.txt $(wildcard native/* native/kernels/* native/quantizers/* native/python/*)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[dev]"
	touch $@

# gptqmodel has no wheels, fifteen packages behind it, and a numpy of its own: they stand in an environment in front of
# the other, which they do not change.
$(GPTQ)/.installed: $(STAMP)
	$(BIN)/python -m venv $(GPTQ)
	$(BIN)/python -c 'import site; print(f"import site; site.addsitedir({site.getsitepackages()[0]!r})")' \
	  > "$$($(GPTQ)/bin/python -c 'import site; print(site.getsitepackages()[0])')/behind.pth"
	$(GPTQ)/bin/python -m pip install --quiet -c constraints.txt gptqmodel optimum
	touch $@

# The runtimes that the benchmarks compare with; without them they run, too, and say who is missing.
$(PEERS): $(STAMP)
	CMAKE_ARGS="-DGGML_NATIVE=ON -DLLAMA_CURL=OFF" $(BIN)/python -m pip install --quiet -c constraints.txt -e ".[peers]"
	touch $@

clean:
	rm -rf $(VENV) build dist demo-output
