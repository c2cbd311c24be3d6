"""What the registry is, as data: experts, services, skills and their stages; read, checked, rendered for the policy."""
