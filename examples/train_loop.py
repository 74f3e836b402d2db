"""Adversarial training with FSR in a training loop of your own, on embedded Fashion-MNIST."""

import timm
import torch

import timm_fsr


def main(images: int = 2000, epochs: int = 3, batch_size: int = 100) -> None:
    """Train a small network, and say how robust it is on test images."""
    torch.manual_seed(0)
    train = timm_fsr.load_data("fashion_mnist", "train", limit=images, progress=False)
    test = timm_fsr.load_data("fashion_mnist", "test", limit=images // 4, progress=False)

    network = timm.create_model("resnet_tiny_cifar_fsr", num_classes=train.num_classes, in_chans=1)
    model = timm_fsr.PixelModel(network)  # from pixels in [0, 1] to logits, as attacks need it
    objective = timm_fsr.AT()  # or TRADES(), MART()
    attack = timm_fsr.PGD(eps=0.1, steps=5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)

    for epoch in range(1, epochs + 1):
        model.train()
        for chosen in torch.randperm(len(train)).split(batch_size):
            terms = objective(
                model, attack, *train.batch(chosen)
            )  # attacks the batch; FSR's losses are among the terms
            optimizer.zero_grad()
            terms.total().backward()
            optimizer.step()
        print(f"epoch {epoch}: " + ", ".join(f"{name} {value.item():.2f}" for name, value in terms.items()))

    print(timm_fsr.evaluate(network, test, eps=0.1, attacks=["pgd20"]))


if __name__ == "__main__":
    main()
