"""Exact algebra over weights."""
