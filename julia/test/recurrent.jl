using Flux, PrunableFlux, Random, Test

@testset "recurrent layers: $(nameof(typeof(layer)))" for layer in
        (RNN(3 => 5), LSTM(3 => 5; bias = false), GRU(3 => 5), GRUv3(3 => 5))
    rng = Xoshiro(6)
    x = randn(rng, Float32, 3, 7, 4)
    model = Chain(layer, x -> x[:, end, :], Dense(5 => 2))
    ours = prunable(model)
    @test length(prunables(ours)) == (layer isa GRUv3 ? 4 : 3)
    @test ours(x) ≈ model(x)
    data = (x, Flux.onehotbatch([1, 2, 1, 2], 1:2))
    prune!(ours, layer isa LSTM ? OBS(iterations = 1) : Taylor(), data; sparsity = 0.6)
    @test sparsity(ours) ≈ 0.6 atol = 0.01
    opt = Flux.setup(Adam(0.01), ours)
    losses = train_masked!(Flux.logitcrossentropy, ours, Iterators.repeated(data, 40), opt)
    @test losses[end] < losses[1]
    @test all(l -> all(iszero, l.dense.weight[.!l.mask]), prunables(ours))
    back = unprunable(ours)
    @test isempty(prunables(back)) && back(x) ≈ ours(x) && typeof(back[1]) == typeof(layer)
end

@testset "attention" begin
    rng = Xoshiro(7)
    model = prunable(Chain(MultiHeadAttention(8; nheads = 2), first, x -> sum(x; dims = 2)[:, 1, :], Dense(8 => 2)))
    data = randn(rng, Float32, 8, 6, 4), Flux.onehotbatch([1, 2, 1, 2], 1:2)
    @test length(prunables(model)) == 5
    @test sparsity(prune!(model, Taylor(), data; sparsity = 0.5)) ≈ 0.5 atol = 0.01
end
