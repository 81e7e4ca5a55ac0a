"""Memory, time and cost of a training run before anything is bought: arithmetic on a recipe's shapes.

Nothing here loads weights or data. Modules are built on torch's meta device to count their parameters; floating-point
operations and activations follow from formulas, which tests hold against what torch counts.
"""
