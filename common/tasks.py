"""The tasks: their text columns, labels and metrics.

GLUE's columns, label order and metrics follow Wang et al. 2019 (https://arxiv.org/abs/1804.07461) and the
hub's ``nyu-mll/glue``. To add a task, add one line to `GLUE`.
"""

from dataclasses import dataclass

from common.metrics import MULTI_LABEL_METRICS, ScoreSpec


@dataclass(frozen=True)
class Task:
    """What a table of examples looks like and how predictions on it are scored.

    Attributes:
        name: the key ``task``.
        text_columns: one column, or two for sentence pairs.
        labels: class names in label order; empty when a score is predicted (STS-B).
        metrics: the metrics reported; the first is the headline.
        validation: split names of the public validation sets, the headline one first.
        multi_label: whether an example has any number of the labels.
    """

    name: str
    text_columns: tuple[str, ...]
    labels: tuple[str, ...]
    metrics: tuple[str, ...] = ("accuracy",)
    validation: tuple[str, ...] = ("validation",)
    label_column: str = "label"
    multi_label: bool = False

    @property
    def regression(self) -> bool:
        return not self.labels

    @property
    def num_labels(self) -> int:
        """Width of the model's head."""
        return len(self.labels) or 1

    @property
    def headline(self) -> str:
        return self.metrics[0]

    @property
    def score_spec(self) -> ScoreSpec:
        return ScoreSpec(num_labels=self.num_labels, metrics=self.metrics, multi_label=self.multi_label)


_ENTAILMENT = ("entailment", "not_entailment")
_SENTENCES = ("sentence1", "sentence2")

GLUE = {
    task.name: task
    for task in (
        Task("cola", ("sentence",), ("unacceptable", "acceptable"), ("matthews", "accuracy")),
        Task("sst2", ("sentence",), ("negative", "positive")),
        Task("mrpc", _SENTENCES, ("not_equivalent", "equivalent"), ("f1", "accuracy")),
        Task("stsb", _SENTENCES, (), ("pearson", "spearman")),
        Task("qqp", ("question1", "question2"), ("not_duplicate", "duplicate"), ("f1", "accuracy")),
        Task(
            "mnli",
            ("premise", "hypothesis"),
            ("entailment", "neutral", "contradiction"),
            validation=("validation_matched", "validation_mismatched"),
        ),
        Task("qnli", ("question", "sentence"), _ENTAILMENT),
        Task("rte", _SENTENCES, _ENTAILMENT),
        Task("wnli", _SENTENCES, ("not_entailment", "entailment")),
    )
}

TOY = Task("toy", ("sentence",), ("negative", "positive"))


def text_task(text_columns: tuple[str, ...], labels: tuple[str, ...], label_column: str, multi_label: bool) -> Task:
    """The task of a user's own file, with any number of classes."""
    metrics = MULTI_LABEL_METRICS if multi_label else ("accuracy", "f1_macro", "matthews")
    return Task("text", text_columns, labels, metrics, label_column=label_column, multi_label=multi_label)
