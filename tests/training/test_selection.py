"""Which validation is the best one, and what counts as a collapse."""

from __future__ import annotations

import math

import pytest

from timm_fsr.training.state import Selection
from timm_fsr.training.validation import judge


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


class TestModelsThatDoNotWork:
    def test_any_model_that_works_is_better(self):
        """One class for all images has a robust accuracy of its share, which a weak model that works may not have."""
        selection = Selection()
        assert selection.update(1, 0.1, 0.1, works=False) is True, "the only one so far"
        assert selection.update(2, 0.05, 0.4) is True
        assert selection.update(3, 0.1, 0.1, works=False) is False
        assert (selection.epoch, selection.robust, selection.works, selection.stale) == (2, 0.05, True, 1)

    def test_while_none_works_the_better_one_is_kept(self):
        selection = Selection()
        found = [selection.update(epoch, *pair, works=False) for epoch, pair in enumerate([(0.1, 0.1), (0.2, 0.2)], 1)]
        assert found == [True, True]
        assert selection.update(3, 0.2, 0.2, works=False) is False

    @pytest.mark.parametrize("pair", [(math.nan, 0.5), (0.9, math.nan), (math.nan, math.nan)])
    def test_a_nan_is_below_all(self, pair):
        selection = Selection()
        selection.update(1, 0.0, 0.1)
        assert selection.update(2, *pair) is False
        assert (selection.epoch, selection.stale) == (1, 1)
        first = Selection()
        assert first.update(1, *pair) is True
        assert first.update(2, 0.0, 0.0, works=False) is True
        assert first.epoch == 2

    def test_a_checkpoint_of_before_is_of_a_model_that_works(self):
        """As nobody knows better; only what is worse by accuracy, or does not work, is refused then."""
        selection = Selection(**{"robust": 0.3, "clean": 0.5, "one_step": None, "epoch": 4, "stale": 0})
        assert selection.update(5, 0.9, 0.9, works=False) is False
        assert selection.update(6, 0.4, 0.4) is True

    def test_a_validation_says_so(self):
        clean, robust = "held_out.clean_accuracy", "held_out.robust_accuracy"
        selection = Selection()
        assert judge({clean: 0.4, robust: 0.05}, selection, epoch=1, patience=None) == (True, "")
        found = {clean: 0.1, robust: 0.1, "held_out.collapsed": 1.0}
        assert judge(found, selection, epoch=2, patience=None) == (False, "")
        assert selection.epoch == 1


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
