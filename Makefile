# Two commands do everything on a fresh machine: make demo, make test.
VENV := $(or $(CUMBRE_VENV),.venv)
export CUMBRE_VENV CUMBRE_PYTHON
SITE ?= night-site

.PHONY: demo test check install mutations benchmarks benchmarks-peers clean

install: ## find an interpreter, create the environment, install
	@bash deploy/bootstrap.sh

demo: install ## a simulated night with real services; the last line is the path of the report
	@$(VENV)/bin/cumbre night --site $(SITE) --fresh $(ARGS)

test: install ## style, types, import laws and all tests
	@bash deploy/test-packages.sh
	$(VENV)/bin/ruff check src tests benchmarks
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports
	$(VENV)/bin/pytest -n 2 --dist loadfile $(ARGS)

check: test

mutations: install ## break the code in one place at a time and see that its test fails; an hour
	@$(VENV)/bin/python tests/mutations/mutate.py $(ARGS)

benchmarks: install ## print the tables of figures
	@for file in benchmarks/*.py; do echo "== $$file"; $(VENV)/bin/python $$file || exit 1; done

PEERS_VENV ?= .venv-peers
benchmarks-peers: install ## other programs on the same pixels as our alert production (SExtractor, SWarp: from apt)
	@$(VENV)/bin/python -m venv $(PEERS_VENV)
	@for name in 'numpy<2.4' astroscrappy photutils reproject sfft; do $(PEERS_VENV)/bin/pip install -q "$$name" || echo "$$name: not installed"; done
	@$(PEERS_VENV)/bin/pip install -q setuptools cython && for name in ois properimage; do \
		$(PEERS_VENV)/bin/pip install -q --no-build-isolation $$name || echo "$$name: not installed"; done
	@$(VENV)/bin/cumbre benchmark alerts --cache .benchmark-images --peers-python $(PEERS_VENV)/bin/python

clean: ## remove the environment and the demonstration site
	rm -rf $(VENV) $(SITE)
