"""Turns a data set into batches for each rank, in an order that can be resumed."""
