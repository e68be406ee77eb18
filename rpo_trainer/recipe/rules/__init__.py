"""Rules of a recipe on more than one field.

`forms`: general forms of rules. `parts`: rules within one part. `chain`: rules between stages. Each model of
`rpo_trainer.recipe.schema` lists its rules.
"""
