"""Task-agnostic distillation of Transformer encoders: a reproducible comparative study."""

from study.descriptions import open_description
from study.files import StudyError
from study.plan import resolve

__all__ = ["StudyError", "open_description", "resolve"]
