"""The five systems image by image, as training code commonly writes them."""
