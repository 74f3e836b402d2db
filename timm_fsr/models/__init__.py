"""Models: registered variants, CIFAR-size networks, saving, loading and converting."""
