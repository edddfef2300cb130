"""Laws that every registered rule is held to, each where the rule declares the trait."""
