"""Models from the published weights of others: `convert`, their `settings`, and a `check` of any model."""
