# Two commands do everything on a fresh machine: make demo, make test.
VENV := $(or $(CUMBRE_VENV),.venv)
export CUMBRE_VENV CUMBRE_PYTHON
SITE ?= night-site

.PHONY: demo test check install benchmarks clean

install: ## find an interpreter, create the environment, install
	@bash deploy/bootstrap.sh

demo: install ## a simulated night with real services; the last line is the path of the report
	@$(VENV)/bin/cumbre night --site $(SITE) --fresh $(ARGS)

test: install ## style, types, import laws and all tests
	$(VENV)/bin/ruff check src tests benchmarks
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports
	$(VENV)/bin/pytest $(ARGS)

check: test

benchmarks: install ## print the tables of figures
	@for file in benchmarks/*.py; do echo "== $$file"; $(VENV)/bin/python $$file || exit 1; done

clean: ## remove the environment and the demonstration site
	rm -rf $(VENV) $(SITE)
