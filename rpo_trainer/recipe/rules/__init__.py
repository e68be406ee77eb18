"""Rules of a recipe that concern more than one field.

`forms`: how a rule is stated. `parts`: rules within one part. `chain`: rules between stages. The models of
`rpo_trainer.recipe.schema` list the rules that hold for them.
"""
