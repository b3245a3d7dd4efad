"""Numbers that others published, to be shown beside the study's and never as its own."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Published:
    """``score`` of a student as its authors give it, ``teacher_score`` on the same measure where they give it too."""

    student: str
    teacher: str
    method: str
    measure: str
    score: float
    source: str
    teacher_score: float | None = None

    @property
    def retained(self) -> float | None:
        """Percent of the teacher's score."""
        return 100 * self.score / self.teacher_score if self.teacher_score else None


MINILMV2 = "Wang et al., Findings of ACL 2021, arXiv 2012.15828"
DISTILBERT, DISTILROBERTA = "Sanh et al., arXiv 1910.01108", "model card of distilroberta-base"
GLUE_PART = "GLUE without CoLA, MRPC and STS-B, average on development sets"
KD_NAS = "Trivedi et al., arXiv 2303.09639"
TINYBERT = "Jiao et al., Findings of EMNLP 2020, arXiv 1909.10351"
GLUE = "GLUE, average on development sets"
XTREME_DISTIL = "Mukherjee et al., arXiv 2106.04563"
GLUE_SQUAD = "part of GLUE and SQuAD 2, average"

PUBLISHED = (
    Published("6 × 768", "BERT-base", "MiniLMv2", "MNLI-m, accuracy", 84.2, MINILMV2),
    Published("6 × 384", "BERT-base", "MiniLMv2", "MNLI-m, accuracy", 82.8, MINILMV2),
    Published("6 × 768", "RoBERTa-large", "MiniLMv2", "MNLI-m, accuracy", 87.0, MINILMV2),
    Published("6 × 384", "XLM-R-large", "MiniLMv2", "XNLI, mean accuracy", 69.3, MINILMV2),
    Published("12 × 384", "XLM-R-large", "MiniLMv2", "XNLI, mean accuracy", 72.9, MINILMV2),
    Published("6 × 768", "BERT-base", "MiniLMv2", GLUE_PART, 86.1, MINILMV2),
    Published("6 × 768", "BERT-base", "MiniLMv2", GLUE_PART, 82.9, "a public re-implementation; mostly lower in RTE"),
    Published("DistilBERT", "BERT-base", "OD, MLM and cosine", GLUE, 77.0, DISTILBERT, 79.5),
    Published("DistilRoBERTa", "RoBERTa-base", "OD, MLM and cosine", GLUE, 82.3, DISTILROBERTA, 86.4),
    Published("TinyBERT 4 × 312", "BERT-base", "mapping uniform", "average of its ablation", 75.6, TINYBERT),
    Published("TinyBERT 4 × 312", "BERT-base", "mapping top", "average of its ablation", 70.9, TINYBERT),
    Published("TinyBERT 4 × 312", "BERT-base", "mapping bottom", "average of its ablation", 71.3, TINYBERT),
    Published("TinyBERT 4 × 312", "BERT-base", "no attention transfer", "average of its ablation", 71.0, TINYBERT),
    Published("TinyBERT 4 × 312", "BERT-base", "no hidden states", "average of its ablation", 72.9, TINYBERT),
    Published("TinyBERT 4 × 312", "BERT-base", "neither", "average of its ablation", 56.3, TINYBERT),
    Published("BERT-base, 12 × 768", "–", "not distilled", GLUE_SQUAD, 84.8, XTREME_DISTIL),
    Published("6 × 256", "–", "embeddings, HS, attention, logits", GLUE_SQUAD, 85.6, XTREME_DISTIL),
    Published("6 × 384", "–", "embeddings, HS, attention, logits", GLUE_SQUAD, 86.6, XTREME_DISTIL),
    Published("12 × 384", "–", "embeddings, HS, attention, logits", GLUE_SQUAD, 88.5, XTREME_DISTIL),
    Published(
        "KD-NAS", "XLM-R-base", "architecture search", "score at 7 × its speed on CPU, in %", 90.0, KD_NAS, 100.0
    ),
)

#: What of these may be set against the study's numbers.
COMPARABLE = (
    "Other teachers, texts and tasks, and far larger budgets: no score above or below is"
    " comparable. What may be set side by side, with caution, is relative: the share of the teacher's score that a"
    " student keeps (it depends on the tasks, and on what chance scores on them), and the order of layer mappings."
)
