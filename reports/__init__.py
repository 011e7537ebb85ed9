"""What is shown: timings, counters, gates and the reports that people and CI read."""
