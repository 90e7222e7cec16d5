# make demo: watch it work. make test: lint, types and tests. make test-all: the slow tests, too. make docs: a site.
# All set up .venv first; python3 is all they need.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test tests test-all docs matrix lint types gpu sanitize quality clean

demo: .venv/ready
	$(BIN)/svg-ear demo $(ARGS)

# Types beside the tests: each of the two leaves a core idle now and then.
test: lint
	$(MAKE) -j2 types tests

tests: export OMP_NUM_THREADS = 1
tests: .venv/ready
	HYPOTHESIS_PROFILE=fuzz_quick $(BIN)/pytest -n 2 --dist worksteal -m "not slow" $(ARGS)
	TRITON_INTERPRET=1 $(BIN)/pytest -n 2 --dist worksteal -m "not slow" tests/interpreted

test-all: lint types
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist worksteal $(ARGS)

# The pages of docs/ as a site in site/. A link that leads nowhere is an error.
docs: .venv/ready
	$(BIN)/mkdocs build --strict

# A few tests on other versions of torch, each in an environment of its own; results go to docs/MODELS.md.
VERSIONS ?= 2.10.0 2.11.0 2.12.1 2.13.0 2.14.1 2.15.0
matrix:
	$(PYTHON) tests/torch_versions.py $(VERSIONS)

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/ready
	$(BIN)/mypy -p svg_ear_compile

# On a machine with a GPU, in an environment that has torch, triton and diffusers.
gpu:
	$(PYTHON) -m pytest -q tests/gpu $(ARGS)

# The figures of docs/QUALITY.md, from weights to tables; an hour of a GPU, half of it training.
quality:
	PYTHON=$(PYTHON) benchmarks/reproduce_quality.sh

# Memory errors and races of the kernels on small shapes; compute-sanitizer comes with CUDA.
sanitize:
	PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --error-exitcode 9 $(PYTHON) tests/gpu/sanitize.py
	compute-sanitizer --tool racecheck --error-exitcode 9 $(PYTHON) tests/gpu/sanitize.py --plain

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q --no-compile -c constraints.txt torch setuptools
	$(BIN)/pip install -q --no-compile -c constraints.txt --no-build-isolation -e '.[dev]'
	@touch $@

clean:
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache build *.egg-info outputs site
