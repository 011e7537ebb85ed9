"""What is right: one readable oracle a system, and the contract they share."""
