"""Runs that train a model that answers questions about pictures, stage by stage, with or without a larger one."""
