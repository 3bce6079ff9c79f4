using PrunableFlux, Test

@test sparsities(OneShot(0.8)) == [0.8]
@test sparsities(Constant(rate = 0.1, rounds = 3)) ≈ [0.1, 0.2, 0.3]
@test sparsities(Exponential(rate = 0.2, rounds = 3)) ≈ [0.2, 0.36, 0.488]
@test sparsities(Polynomial(sparsity = 0.9, rounds = 4)) ≈ 0.9 .* (1 .- [0.75, 0.5, 0.25, 0.0] .^ 3)
@test sparsities(Polynomial(sparsity = 0.8, rounds = 2, power = 1)) ≈ [0.4, 0.8]
@test sparsities(Cosine(sparsity = 0.8, rounds = 4)) ≈ 0.4 .* (1 .- cos.(π .* (1:4) ./ 4))
@test sparsities([0.1, 0.1, 0.5]) == [0.1, 0.1, 0.5]
@test sparsities(Exponential(rate = [0.2, 0.1], rounds = 2)) ≈ [[0.2, 0.1], [0.36, 0.19]]
@test_throws ArgumentError sparsities([0.5, 0.4])
@test_throws ArgumentError sparsities([[0.5, 0.5], [0.6, 0.4]])
@test_throws ArgumentError sparsities([0.5, 1.0])
@test_throws ArgumentError sparsities([NaN])
@test_throws ArgumentError sparsities(Float64[])
@test_throws ArgumentError sparsities(Constant(rate = 0.3, rounds = 4))
@test_throws ArgumentError sparsities(Exponential(rate = 0.3, rounds = 0))
