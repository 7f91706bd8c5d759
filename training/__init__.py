"""Scripts that train the models of the AvatarPointillist toolkit, and what they share."""
