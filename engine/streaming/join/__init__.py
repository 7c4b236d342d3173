"""Interactions meet the ranking that showed their item: labelled examples with the features as served."""
