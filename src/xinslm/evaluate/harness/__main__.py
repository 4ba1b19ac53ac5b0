"""The command line of lm-evaluation-harness with the model `xinslm` in it."""

import lm_eval.__main__

import xinslm.evaluate.harness.model  # noqa: F401  (registers it)

if __name__ == "__main__":
    lm_eval.__main__.cli_evaluate()
