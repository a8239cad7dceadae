"""Tables and figures of models and runs."""
