"""Ask a model about images, see where FSR's mask trusts them, and find how little changes an answer."""

from pathlib import Path

from torchvision.transforms.functional import to_pil_image

import timm_fsr


def main(images: int = 3, folder: str = "example_masks", robustness: bool = True) -> None:
    """Ask the checkpoint inside the package about some test images, written as files first."""
    data = timm_fsr.load_data("fashion_mnist", "test", limit=max(images, 10), progress=False)
    Path(folder).mkdir(exist_ok=True)
    for index in range(images):
        to_pil_image(data.images[index]).save(
            Path(folder) / f"{index}_{data.classes[data.labels[index]].split('/')[0]}.png"
        )

    found = timm_fsr.predict(
        "resnet_tiny_cifar_fsr.at_fashion_mnist",  # or a folder, "hf-hub:user/name", or a model in memory
        f"{folder}/[0-9]*.png",
        topk=2,
        masks=f"{folder}/masks",
        robustness=robustness,
    )
    for one in found:
        print(one)
        print(f"  mask over the image: {one.drawing}")


if __name__ == "__main__":
    main()
