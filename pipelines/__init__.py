"""WHEN and WHERE: flows, profiles, promotion and packaging around the graph. Nothing here computes from data; that is a stage's work."""
