# make demo | test | fast | native | interop | check | bench     on a fresh machine each sets up .venv first; needs only python3 (>= 3.10) and g++
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
PEERS  := $(VENV)/.peers
GPTQ   := $(VENV)/gptq
LLAMA  := $(VENV)/llama.cpp

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
interop: $(STAMP) $(GPTQ)/.installed $(LLAMA)/.installed
	PATH="$(CURDIR)/$(LLAMA)/bin:$$PATH" $(BIN)/python -m pytest -n 2 --dist loadgroup -m interop
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

# llama.cpp's own count of memory, which plan --exact asks: from the sources that its Python package has, unoptimized,
# which takes two minutes and changes no figure.
$(LLAMA)/.installed: | $(STAMP)
	rm -rf $(LLAMA)
	$(BIN)/python -m pip download --quiet --no-deps --no-binary llama-cpp-python -c constraints.txt -d $(LLAMA) llama-cpp-python
	mkdir $(LLAMA)/source
	tar -xzf $(LLAMA)/llama_cpp_python-*.tar.gz -C $(LLAMA)/source --strip-components 1
	$(BIN)/cmake -S $(LLAMA)/source/vendor/llama.cpp -B $(LLAMA) -DCMAKE_BUILD_TYPE=None -DCMAKE_C_FLAGS=-O0 \
	  -DCMAKE_CXX_FLAGS=-O0 -DGGML_NATIVE=OFF -DGGML_OPENMP=OFF -DGGML_LLAMAFILE=OFF -DLLAMA_OPENSSL=OFF \
	  -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_UI=OFF > $(LLAMA)/log
	$(BIN)/cmake --build $(LLAMA) --target llama-fit-params -j 2 >> $(LLAMA)/log
	rm -rf $(LLAMA)/*.tar.gz
	touch $@

# The runtimes that the benchmarks compare with; without them they run, too, and say who is missing.
$(PEERS): $(STAMP)
	CMAKE_ARGS="-DGGML_NATIVE=ON -DLLAMA_CURL=OFF" $(BIN)/python -m pip install --quiet -c constraints.txt -e ".[peers]"
	touch $@

clean:
	rm -rf $(VENV) build dist demo-output
