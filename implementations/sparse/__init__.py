"""The systems by way of what can matter: costs of few pairs, losses of positives, gradients written once."""
