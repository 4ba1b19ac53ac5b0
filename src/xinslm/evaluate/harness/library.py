"""What our model needs of lm-evaluation-harness, imported without what it rarely uses."""

from xinslm.evaluate.harness.start import late_modules, no_collection

with late_modules(), no_collection():
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.api.samplers import FirstNSampler
    from lm_eval.models.utils import has_bos_prefix
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

__all__ = [
    "FirstNSampler",
    "TaskManager",
    "TemplateLM",
    "get_rolling_token_windows",
    "has_bos_prefix",
    "make_disjoint_window",
    "register_model",
]
