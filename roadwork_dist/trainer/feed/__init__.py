"""From a data set to the batches of each rank, in an order that can be resumed."""
