"""What other pruning libraries make of the same networks."""
