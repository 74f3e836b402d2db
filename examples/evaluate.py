"""Judge the robustness of a model: accuracies with intervals, the worst class, and a page to look at."""

import timm

import timm_fsr


def main(images: int = 200, attacks: tuple[str, ...] = ("fgsm", "pgd20"), folder: str = "example_report") -> None:
    """Evaluate the checkpoint inside the package; with more time, on more images and by "standard" and "adaptive"."""
    model = timm.create_model("resnet_tiny_cifar_fsr.at_fashion_mnist", pretrained=True)
    data = timm_fsr.load_data("fashion_mnist", "test", limit=images, progress=False)

    report = timm_fsr.assess(model, data, folder, eps=0.1, attacks=attacks, name="my model", overwrite=True)

    for name in ("clean", *attacks, "worst_case"):
        low, high = report.interval(name)
        print(f"{name}: {100 * report.accuracy_of(name):.1f} % [{100 * low:.1f}, {100 * high:.1f}]")
    worst = min(
        (share, name) for share, name in zip(report.per_class(), data.classes, strict=True) if share is not None
    )
    print(f"the weakest class is {worst[1]}: {100 * worst[0]:.1f} % in the worst case")
    print(report.upper_bound or "strong attacks were among them")
    print(f"page: {folder}/report.html")


if __name__ == "__main__":
    main()
