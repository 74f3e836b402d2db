"""TRADES and MART against their published formulas, written out here line by line."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from support.objectives import FSR_TERMS, Brighten, assert_terms, brighter, cross_entropy, fsr_terms, log_probabilities
from support.tiny import assert_same_gradients, images, labels, same_state, state, tiny_resnet, tiny_vit, with_fsr
from torch import Tensor, nn

from timm_fsr.attacks.base import attack_mode, input_gradient
from timm_fsr.attacks.pgd import FGSM, NFGSM, PGD
from timm_fsr.training.objectives.base import Objective
from timm_fsr.training.objectives.mart import MART
from timm_fsr.training.objectives.natural import Natural
from timm_fsr.training.objectives.trades import TRADES

METHODS = [
    TRADES(),
    TRADES(beta=2.5, label_smoothing=0.3),
    MART(),
    MART(beta=2.5, label_smoothing=0.3),
    MART(beta=0),
]


def divergence(clean: Tensor, log_attacked: Tensor) -> Tensor:
    """KL(clean || attacked) per image, from logits of the clean and log-probabilities of the attacked images."""
    log_clean = log_probabilities(clean)
    return (log_clean.exp() * (log_clean - log_attacked)).sum(1)


def trades(clean: Tensor, attacked: Tensor, classes: Tensor, beta: float, smoothing: float = 0.0) -> dict[str, Tensor]:
    """Equation 5 of its paper, as its code averages it."""
    consistency = divergence(clean, log_probabilities(attacked)).sum() / len(clean)
    return {"natural": cross_entropy(clean, classes, smoothing).mean(), "consistency": beta * consistency}


def mart(clean: Tensor, attacked: Tensor, classes: Tensor, beta: float, smoothing: float = 0.0) -> dict[str, Tensor]:
    """Equation 11 of its paper, image by image, with the small numbers of its code."""
    margins, weighted = [], []
    for one, other, label in zip(clean, attacked, classes.tolist(), strict=True):
        p_clean, p_attacked = log_probabilities(one[None]).exp()[0], log_probabilities(other[None]).exp()[0]
        _, second, first = p_attacked.argsort()[-3:].tolist()
        rival = second if first == label else first
        margins.append(-(1.0001 - p_attacked[rival] + 1e-12).log())
        kl = (p_clean * (p_clean.log() - (p_attacked + 1e-12).log())).sum()
        weighted.append(kl * (1.0000001 - p_clean[label]))
    return {
        "adversarial": cross_entropy(attacked, classes, smoothing).mean(),
        "margin": torch.stack(margins).mean(),
        "consistency": beta * torch.stack(weighted).mean(),
    }


def by_hand(objective: Objective, clean: Tensor, attacked: Tensor, classes: Tensor) -> dict[str, Tensor]:
    formula = trades if isinstance(objective, TRADES) else mart
    return formula(clean, attacked, classes, objective.beta, objective.label_smoothing)


class Table(nn.Module):
    """A model whose logits are its parameter, row by row of the batch: gradients are those of the logits."""

    def __init__(self, *logits: Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.cat(logits))

    def forward(self, given: Tensor) -> Tensor:
        assert len(given) == len(self.logits)
        return self.logits


def terms_of(
    objective: Objective, clean: Tensor, attacked: Tensor, classes: Tensor
) -> tuple[dict[str, Tensor], Tensor]:
    """The terms of these logits, and the gradient of their sum with respect to the logits, clean ones first."""
    model = Table(clean, attacked)
    blank = torch.zeros(len(clean), 1, 1, 1)
    terms = objective.terms(model, PGD(), blank, blank, classes)
    terms.total().backward()
    return {name: term.detach() for name, term in terms.items()}, model.logits.grad


def random_logits(classes: int = 4, count: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    clean, attacked = (2 * torch.randn(count, classes, generator=generator) for _ in range(2))
    return clean, attacked, torch.arange(count) % classes


@pytest.fixture(params=["plain", "fsr"])
def model(request: pytest.FixtureRequest) -> nn.Module:
    """In training mode; without noise, so that two passes agree."""
    model = tiny_resnet()
    with torch.no_grad():
        model.get_classifier().weight.mul_(20)  # so that clean and attacked images are told apart
    return model.train() if request.param == "plain" else with_fsr(model, noise=False).train()


@pytest.mark.parametrize("objective", METHODS, ids=repr)
class TestBoth:
    def test_terms_are_those_of_one_pass_over_both_halves(self, model, objective):
        """Auxiliary terms are those of the adversarial half."""
        terms = objective(model, Brighten(model), images(), labels())
        both = torch.cat([images(), brighter(images())])
        clean, attacked = model(both).detach().chunk(2)
        auxiliary = fsr_terms(model, both, slice(4, None))
        assert_terms(terms, {**by_hand(objective, clean, attacked, labels()), **auxiliary})
        other = fsr_terms(model, both, slice(0, 4))
        assert all(abs(auxiliary[name] - other[name]) > 1e-3 for name in other), "the halves cannot be told apart"

    def test_with_fixed_statistics_they_are_those_of_two_passes(self, model, objective):
        """As the original code makes them; so the halves do not touch each other."""
        model.eval()
        terms = objective(model, Brighten(model), images(), labels())
        clean, attacked = model(images()).detach(), model(brighter(images())).detach()
        expected = by_hand(objective, clean, attacked, labels())
        assert_terms(terms, {**expected, **fsr_terms(model, brighter(images()))})

    def test_a_model_without_batch_norm_agrees_with_two_passes_in_training(self, objective):
        model = tiny_vit().train()
        other = copy.deepcopy(model)
        adversarial = brighter(images())
        objective.terms(model, PGD(), images(), adversarial, labels()).total().backward()
        torch.stack(list(by_hand(objective, other(images()), other(adversarial), labels()).values())).sum().backward()
        assert_same_gradients(model, other)

    def test_the_gradient_flows_through_both_halves(self, objective):
        clean, attacked, classes = random_logits()
        _, gradient = terms_of(objective, clean, attacked, classes)
        leaves = [logits.double().requires_grad_() for logits in (clean, attacked)]
        torch.stack(list(by_hand(objective, *leaves, classes).values())).sum().backward()
        for found, leaf in zip(gradient.chunk(2), leaves, strict=True):
            torch.testing.assert_close(found.double(), leaf.grad, rtol=1e-4, atol=1e-6)
        assert all(leaf.grad.abs().max() > 0.01 for leaf in leaves) or objective.beta == 0


class TestTRADES:
    def test_its_gradient_at_the_logits_is_the_textbooks(self):
        """With p clean and q attacked: of the KL term (q - p) / N at the attacked logits, for one."""
        clean, attacked, classes = random_logits()
        terms, gradient = terms_of(TRADES(beta=6.0), clean, attacked, classes)
        log_p, log_q = log_probabilities(clean), log_probabilities(attacked)
        p, q, count = log_p.exp(), log_q.exp(), len(clean)
        kl = (p * (log_p - log_q)).sum(1, keepdim=True)
        assert float(terms["consistency"]) == pytest.approx(6 * float(kl.mean()), rel=1e-5)
        at_clean = (p - torch.eye(4)[classes]) / count + 6 * p * (log_p - log_q - kl) / count
        torch.testing.assert_close(gradient[:count].double(), at_clean, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(gradient[count:].double(), 6 * (q - p) / count, rtol=1e-4, atol=1e-6)

    def test_the_attack_maximises_the_divergence_in_eval_mode(self, model):
        with attack_mode(model), torch.no_grad():
            expected = divergence(model(images()), log_probabilities(model(brighter(images()))))
        assert expected.min() > 1e-4
        attack, generator = Brighten(model), torch.Generator()
        TRADES(label_smoothing=0.3)(model, attack, images(), labels(), generator=generator)
        assert attack.modes == {False}
        assert attack.frozen
        assert attack.generator is generator
        torch.testing.assert_close(attack.losses.double(), expected, rtol=1e-3, atol=1e-6)

    def test_labels_have_no_part_in_its_attack(self, model):
        one, other = (
            TRADES().craft(model, PGD(steps=2), images(), given, generator=torch.Generator().manual_seed(1))
            for given in (labels(), labels().flip(0))
        )
        assert torch.equal(one, other)

    def test_pgd_raises_the_divergence_from_its_random_start(self, model):
        ascended, start = (
            TRADES().craft(model, attack, images(), labels(), generator=torch.Generator().manual_seed(1))
            for attack in (PGD(eps=0.1, steps=5), PGD(eps=0.1, steps=1, step_size=1e-9))
        )
        with attack_mode(model), torch.no_grad():
            loss_fn = TRADES().attack_loss(model, images(), labels())
            assert (loss_fn(ascended) > 2 * loss_fn(start)).all()

    def test_at_the_image_itself_the_divergence_has_no_gradient(self, model):
        with attack_mode(model):
            loss_fn = TRADES().attack_loss(model, images(), labels())
            at_image, beside = (
                input_gradient(loss_fn, given).abs().amax((1, 2, 3)) for given in (images(), brighter(images()))
            )
        assert (at_image < 1e-4 * beside).all()

    @pytest.mark.parametrize("attack", [PGD(random_start=False), FGSM()], ids=repr)
    def test_so_an_attack_that_starts_there_is_refused(self, model, attack):
        for refused in (
            lambda: TRADES().check_attack(attack),
            lambda: TRADES().craft(model, attack, images(), labels()),
            lambda: TRADES()(model, attack, images(), labels()),
        ):
            with pytest.raises(ValueError, match=r"gradient is zero at the image itself.* random_start"):
                refused()
        MART().check_attack(attack)
        TRADES(beta=0).check_attack(attack)

    @pytest.mark.parametrize("attack", [PGD(), PGD(steps=1), PGD(start_noise=0.001), NFGSM()], ids=repr)
    def test_attacks_that_start_beside_the_image_are_taken(self, model, attack):
        TRADES().check_attack(attack)
        crafted = TRADES().craft(model, attack, images(), labels())
        assert not torch.equal(crafted, images())

    @pytest.mark.parametrize("smoothing", [0.0, 0.3])
    def test_beta_0_is_natural_training_to_the_bit(self, model, smoothing):
        other, attack = copy.deepcopy(model), Brighten(model)
        terms = TRADES(beta=0, label_smoothing=smoothing)(model, attack, images(), labels())
        natural = Natural(label_smoothing=smoothing)(other, attack, images(), labels())
        assert attack.losses is None, "an attack without effect was run"
        assert list(terms) == list(natural)
        assert all(torch.equal(terms[name], natural[name]) for name in natural)
        assert list(terms.logits) == ["clean"]
        assert same_state(model, state(other))
        terms.total().backward()
        natural.total().backward()
        for one, two in zip(model.parameters(), other.parameters(), strict=True):
            assert torch.equal(one.grad, two.grad)

    def test_label_smoothing_is_of_the_natural_term_alone(self):
        clean, attacked, classes = random_logits()
        sharp, smooth = (terms_of(TRADES(label_smoothing=s), clean, attacked, classes)[0] for s in (0.0, 0.3))
        assert torch.equal(sharp["consistency"], smooth["consistency"])
        assert float(smooth["natural"]) == pytest.approx(float(cross_entropy(clean, classes, 0.3).mean()), rel=1e-5)


class TestMART:
    # Probabilities of three classes; label 0. The strongest wrong class is the runner-up, then the winner.
    CLEAN = ((0.7, 0.2, 0.1), (0.25, 0.5, 0.25))
    ATTACKED = ((0.6, 0.1, 0.3), (0.2, 0.75, 0.05))

    @pytest.fixture
    def tables(self) -> tuple[Tensor, Tensor, Tensor]:
        clean, attacked = (torch.tensor(rows).log() for rows in (self.CLEAN, self.ATTACKED))
        return clean, attacked, torch.zeros(2, dtype=torch.long)

    def test_its_terms_are_those_computed_from_probabilities_on_paper(self, tables):
        terms, _ = terms_of(MART(beta=5.0), *tables)
        assert float(terms["adversarial"]) == pytest.approx(-(math.log(0.6) + math.log(0.2)) / 2, rel=1e-5)
        assert float(terms["margin"]) == pytest.approx(-(math.log(0.7001) + math.log(0.2501)) / 2, rel=1e-5)
        kl = [
            sum(p * math.log(p / q) for p, q in zip(*rows, strict=True))
            for rows in zip(self.CLEAN, self.ATTACKED, strict=True)
        ]
        assert float(terms["consistency"]) == pytest.approx(5 * (0.3 * kl[0] + 0.75 * kl[1]) / 2, rel=1e-5)

    @pytest.mark.parametrize(("image", "weight"), [(0, 0.3), (1, 0.75)])
    def test_each_image_is_weighted_by_the_doubt_in_its_label(self, tables, image, weight):
        clean, attacked, classes = (table[image : image + 1] for table in tables)
        consistency = terms_of(MART(beta=1.0), clean, attacked, classes)[0]["consistency"]
        kl = float(divergence(clean, log_probabilities(attacked)))
        assert float(consistency) / kl == pytest.approx(weight, rel=1e-4)

    def test_the_weights_learn_too(self, tables):
        """As in the original: no part of the consistency term is detached."""
        clean, attacked, _ = tables
        clean.requires_grad_()
        weights = 1 - clean.softmax(1)[:, 0]
        (weights.detach() * divergence(clean, log_probabilities(attacked))).mean().backward()
        without = clean.grad
        zero = terms_of(MART(beta=0.0), *(table.detach() for table in tables))[1]
        found = terms_of(MART(beta=1.0), *(table.detach() for table in tables))[1] - zero
        assert (found[:2] - without).abs().max() > 0.01

    def test_certain_models_give_finite_terms_and_gradients(self):
        """A wrong class of probability 1, a label of probability 1, a class of probability 0: 1e-12 and its kin."""
        clean, attacked = torch.tensor([[50.0, 0.0, 0.0]]), torch.tensor([[0.0, 200.0, 0.0]])
        terms, gradient = terms_of(MART(), clean, attacked, torch.tensor([0]))
        assert float(terms["margin"]) == pytest.approx(-math.log(0.0001), rel=1e-3)
        assert float(terms["consistency"]) == pytest.approx(5 * 1e-7 * -math.log(1e-12), rel=0.3)
        assert gradient.isfinite().all()

    def test_beta_0_leaves_the_boosted_cross_entropy(self, tables):
        terms, _ = terms_of(MART(beta=0.0), *tables)
        assert float(terms["consistency"]) == 0
        assert float(terms["margin"]) > 0

    def test_label_smoothing_is_of_the_cross_entropy_alone(self, tables):
        sharp, smooth = (terms_of(MART(label_smoothing=s), *tables)[0] for s in (0.0, 0.3))
        assert all(torch.equal(sharp[name], smooth[name]) for name in ("margin", "consistency"))
        _, attacked, classes = tables
        expected = cross_entropy(attacked, classes, 0.3).mean()
        assert float(smooth["adversarial"]) == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("objective", [TRADES(), MART()], ids=repr)
def test_every_auxiliary_weight_and_noise_of_fsr_go_with_them(objective):
    model = with_fsr(tiny_resnet(), separation_weight=3.0).train()
    model.fsr["layer4"].noise = True
    torch.manual_seed(1)
    terms = objective(model, Brighten(model), images(), labels())
    assert list(terms)[-2:] == FSR_TERMS
    terms.total().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
