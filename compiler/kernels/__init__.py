"""Kernel generators: one PrimFunc for the shapes and the target asked for."""
