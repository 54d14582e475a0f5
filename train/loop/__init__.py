"""The one training loop with its metrics, goodput, schedules and plateau."""
