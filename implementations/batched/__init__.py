"""The five systems over a whole batch at once, padded and masked."""
