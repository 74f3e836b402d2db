"""Models: registered variants, CIFAR-size networks, saving, loading and converting."""

import timm  # noqa: F401  (first: it registers the variants, which need modules of this room that are whole)
