"""Recall and accuracy on hand-made rankings."""

import numpy as np

from mmalign.evaluation.evaluate import retrieval
from mmalign.evaluation.metrics import accuracy, recall_at
from mmalign.index.measure import neighbour_recall


def test_any_caption_of_the_image_counts() -> None:
    owners = np.array([0, 0, 1, 1])  # captions 0 and 1 belong to image 0
    ranked = np.array([[2, 1, 0, 3], [2, 0, 1, 3]])
    assert recall_at(ranked, owners, np.array([0, 1]), [1, 2]) == {1: 0.5, 2: 1.0}


def test_missing_candidates_are_no_hits() -> None:
    assert recall_at(np.array([[-1]]), np.array([5, 0]), np.array([0]), [1]) == {1: 0.0}


def test_retrieval_by_hand() -> None:
    images = np.eye(3, dtype=np.float32)
    texts = np.eye(3, dtype=np.float32)[[0, 1, 0, 2]]  # the third caption describes image 2 badly
    report = retrieval(images, texts, np.array([0, 1, 2, 2]))
    assert report["image_retrieval_recall@1"] == 0.75
    assert report["text_retrieval_recall@1"] == 1.0


def test_neighbour_recall_ignores_padding() -> None:
    assert neighbour_recall(np.array([[4, -1]]), np.array([[4, -1]])).tolist() == [1.0]


def test_mean_per_class_recall_weighs_classes_alike() -> None:
    ranked = np.array([[0], [0], [0], [0]])
    report = accuracy(ranked, np.array([0, 0, 0, 1]), ks=[1])
    assert report == {"acc1": 0.75, "mean_per_class_recall": 0.5}
