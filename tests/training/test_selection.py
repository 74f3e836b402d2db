"""Which validation is the best one, and what counts as a collapse."""

from __future__ import annotations

import pytest

from timm_fsr.training.state import Selection


def after(*found: tuple[float, float]) -> Selection:
    """A selection that has seen these (robust, clean) accuracies in epochs 1, 2, ..."""
    selection = Selection()
    for epoch, (robust, clean) in enumerate(found, start=1):
        selection.update(epoch, robust, clean)
    return selection


class TestBest:
    @pytest.mark.parametrize(
        ("found", "epoch"),
        [
            ([(0.3, 0.8), (0.4, 0.5)], 2),
            ([(0.4, 0.5), (0.3, 0.9)], 1),
            ([(0.4, 0.5), (0.4, 0.6)], 2),
            ([(0.4, 0.6), (0.4, 0.5)], 1),
            ([(0.4, 0.6), (0.4, 0.6)], 1),
            ([(0.0, 0.0), (0.0, 0.0)], 1),
        ],
        ids=["robust", "robust before clean", "then clean", "less clean", "then the earlier", "even nothing right"],
    )
    def test_it_is_the_most_robust_then_the_cleanest_then_the_earliest(self, found, epoch):
        assert after(*found).epoch == epoch

    def test_it_keeps_the_values_of_its_own_epoch(self):
        selection = Selection()
        assert selection.update(3, 0.4, 0.6, 0.5) is True
        assert selection.update(5, 0.2, 0.9, 0.8) is False
        assert selection == Selection(robust=0.4, clean=0.6, one_step=0.5, epoch=3, stale=1)

    def test_a_better_one_without_a_one_step_accuracy_forgets_the_old(self):
        selection = Selection(robust=0.3, clean=0.5, one_step=0.4, epoch=1)
        selection.update(2, 0.5, 0.5)
        assert selection.one_step is None

    def test_validations_since_then_are_counted_and_a_better_one_starts_anew(self):
        found = [(0.3, 0.5), (0.2, 0.5), (0.3, 0.5), (0.3, 0.4)]
        assert [after(*found[:count]).stale for count in range(5)] == [0, 0, 1, 2, 3]
        assert after(*found, (0.31, 0.1)).stale == 0


class TestCollapse:
    @pytest.mark.parametrize(
        ("best", "robust", "one_step", "collapsed"),
        [
            (0.40, 0.19, 0.51, True),
            (0.40, 0.20, 0.51, False),  # exactly half is not less than half
            (0.40, 0.30, 0.51, False),  # ten points, but not half
            (0.18, 0.00, 0.51, True),
            (0.09, 0.00, 0.51, False),  # all of it, but not ten points
            (0.40, 0.00, 0.50, False),  # the model got weaker under one step too, or stayed
            (0.40, 0.00, 0.49, False),
            (0.40, 0.45, 0.60, False),
        ],
    )
    def test_robust_accuracy_loses_half_and_ten_points_while_that_under_one_step_rises(
        self, best, robust, one_step, collapsed
    ):
        selection = Selection(robust=best, clean=0.8, one_step=0.5, epoch=1)
        assert selection.collapsed(robust, one_step) is collapsed

    def test_exactly_ten_points_count(self):
        selection = Selection(robust=0.125, one_step=0.5, epoch=1)
        assert selection.collapsed(0.02, 0.6)
        assert not selection.collapsed(0.03, 0.6)

    def test_without_a_one_step_accuracy_then_or_now_nothing_is_said(self):
        assert not Selection(robust=0.5, one_step=None, epoch=1).collapsed(0.0, 0.9)
        assert not Selection(robust=0.5, one_step=0.5, epoch=1).collapsed(0.0, None)

    def test_the_first_validation_cannot_be_one(self):
        assert not Selection().collapsed(0.0, 0.9)

    def test_asking_changes_nothing(self):
        selection = Selection(robust=0.5, clean=0.8, one_step=0.5, epoch=4, stale=2)
        selection.collapsed(0.0, 0.9)
        assert selection == Selection(robust=0.5, clean=0.8, one_step=0.5, epoch=4, stale=2)
