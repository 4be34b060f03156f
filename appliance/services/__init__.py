"""The services, and the only place that wires the stages together."""
