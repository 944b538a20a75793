"""EWA in training loops of other libraries, each importable where its library is: `lightning`, `transformers`."""
