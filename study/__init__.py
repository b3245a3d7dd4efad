"""Task-agnostic distillation of Transformer encoders: a reproducible comparative study."""

from study.config import Params, StudyError, load_params
from study.mappings import layer_mapping

__all__ = ["Params", "StudyError", "layer_mapping", "load_params"]
