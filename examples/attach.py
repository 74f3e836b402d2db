"""Attach FSR to any timm model, look at its mask, save the model, reload it by timm, and take FSR off again."""

import sys
import tempfile

import timm.data
import torch

import timm_fsr


def main(name: str = "resnet18") -> None:
    """Show it on the timm model called `name`, with random weights: nothing is downloaded."""
    model = timm_fsr.attach(timm.create_model(name, num_classes=10), "fsr", at=(-1,))  # -1: its last stage
    size = timm.data.resolve_model_data_config(model)["input_size"]
    images, labels = torch.rand(2, *size), torch.tensor([3, 7])

    with timm_fsr.record(model, labels) as tape:  # what the layer says in addition to the logits
        logits = model(images)
    for site in tape:
        print(f"{site}: mask of shape {tuple(tape[site].mask.shape)}, mean {tape[site].mask.mean():.2f}")
    print("auxiliary losses:", {key: round(value.item(), 3) for key, value in tape.losses(logits).items()})

    with tempfile.TemporaryDirectory() as folder:  # timm's own format, which timm itself reads
        timm_fsr.save_pretrained(model, folder)
        again = timm.create_model(f"local-dir:{folder}", pretrained=True)
    print("reloaded, the same logits:", torch.equal(model.eval()(images), again.eval()(images)))

    timm_fsr.detach(model)
    print("detached, weights of FSR left:", sum(key.startswith("fsr.") for key in model.state_dict()))


if __name__ == "__main__":
    main(*sys.argv[1:])
