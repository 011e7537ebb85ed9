"""What must hold: scenes, comparison, properties and planted faults."""
