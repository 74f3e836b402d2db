"""Names and defaults that help texts show; the modules that use them are too heavy to import for help."""

EMBEDDED = "fashion_mnist"
CLASS_ORDERS = ("codepoint", "timm")
ON_ERROR = ("stop", "skip")
CARD, REPORT, PAGE, RECIPE = "README.md", "report.json", "report.html", "recipe.yaml"
EXPORTS = {"pt2": "model.pt2", "onnx": "model.onnx"}  # formats of `timm-fsr export`, and their files
BATCH_SIZE = 250
PREDICT_BATCH_SIZE = 64
PRECISIONS = ("fp32", "bf16", "fp16")
CONVERTIBLE = (
    "resnet18_cifar",
    "wrn34_10_cifar",
    "wrn28_10_cifar",
    "preact_resnet18_cifar",
    "resnet18_cifar_fsr",
    "vgg16_bn_cifar_fsr",
    "wrn34_10_cifar_fsr",
)
