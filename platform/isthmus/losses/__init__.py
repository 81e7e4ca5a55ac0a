"""Objectives. Each is local sum x world size / global count, so that any number of ranks gives one answer."""
