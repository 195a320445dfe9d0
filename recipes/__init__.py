"""How what the package ships was made; kept outside the wheel. Recipes import `envs`; nothing imports them."""
