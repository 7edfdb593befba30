"""Runs that train a classifier from labelled images, a pool without labels, and a dual encoder that teaches it."""
