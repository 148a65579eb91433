# make experiment   the eight configs at CPU size, from nothing to the table and the plots
# make test         the style, the pre-flight and the tests

PYTHON ?= python3
BIN = .venv/bin

experiment: .venv/installed
	$(BIN)/python data/pystdlib/prepare.py
	$(BIN)/python sweep.py --with config/cpu.py --jobs 2
	$(BIN)/python compare.py out/*-cpu --out=out/compare

# the script's table is the full-size pre-flight, so pytest leaves that out; the corpus is prepared first:
# tests that want it run side by side, one thread each
test: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/python test_20k_experiment.py
	$(BIN)/python data/pystdlib/prepare.py
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --maxprocesses=8 --dist=worksteal \
		--deselect=test_20k_experiment.py::test_guide test_20k_experiment.py tests

.venv/installed: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "error: PYTHON is $(PYTHON), " \
		"which is " + sys.version.split()[0] + ", it must be 3.11 or newer")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

.PHONY: experiment test
